# syntax=docker/dockerfile:1
# The line above fetches the newest Dockerfile syntax, so every Docker with BuildKit (the default since 23) can build
# this file. An engine before 25 runs the image too; it ignores --start-interval of the health check.
#
# One image for every command of run.py: docker run IMAGE server | worker | migrate | …
FROM python:3.11-slim-bookworm AS builder
WORKDIR /build
# Copy only the files that declare the dependencies, so that a change of the code does not reinstall them. Without
# server/ beside them, `pip install .` installs the package's metadata (its version) and its requirements.
COPY setup.cfg pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /venv && pip --python /venv/bin/python install --constraint constraints.txt '.[otel]'
WORKDIR /app
COPY run.py ./
COPY sql ./sql
COPY server ./server
# Make the files readable under any umask of the checkout. Compile here, because the running container cannot.
RUN chmod -R u=rwX,go=rX /app && python -m compileall -q /app

FROM python:3.11-slim-bookworm
# For jobs: bubblewrap (where the container may create namespaces; Landlock is the sandbox elsewhere) and JavaScript.
# No pinned versions, because a rebuild is meant to bring Debian's security updates.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bubblewrap nodejs \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-log-init --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin app
COPY --from=builder /venv /venv
COPY --from=builder /app /app
WORKDIR /app
# The rules of production apply by default; the environment of the container can override this.
ENV APP_ENV=production \
    PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 3000
# Probe the server at the address where it listens: Linux treats 0.0.0.0 and :: as its own loopback addresses. A
# worker has another probe (docker-compose.yml).
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --start-interval=1s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; h = os.environ.get('HOST') or '0.0.0.0'; p = os.environ.get('PORT') or 3000; urllib.request.urlopen(f'http://[{h}]:{p}/health' if ':' in h else f'http://{h}:{p}/health', timeout=2)"]
# Exec form: SIGTERM reaches Python itself, which starts the graceful shutdown.
ENTRYPOINT ["python", "run.py"]
CMD ["server"]
