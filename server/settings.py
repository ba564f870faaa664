"""Settings: read from the environment and validated once, then frozen.

The only module that reads the environment. Every field knows its help text and its default, so that the
table in docs/reference.md, ``.env.example`` and the code can be compared by a test. The variable is the field's
name in upper case.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import limits
from environs import Env, EnvError, EnvValidationError, validate

DEVELOPMENT, TEST, PRODUCTION = "development", "test", "production"
MINIMUM_SECRET_BYTES = 32
MINIMUM_PRODUCTION_ROUNDS = 10
Network = IPv4Network | IPv6Network


class StartError(Exception):
    """A process cannot start, or not go on; the text is one line for whoever started it."""


class SettingsError(StartError):
    """A setting is missing or bad; the text is one line that names it."""


def invalid(name: str, why: str) -> SettingsError:
    """Return the error for a bad value; ``why`` is a sentence that shows no secret."""
    return SettingsError(f'Environment variable "{name}" invalid: {why}')


@dataclass(frozen=True)
class PerEnvironment:
    """A default that differs in development."""

    development: Any
    otherwise: Any

    def choose(self, app_env: str) -> Any:
        return self.development if app_env == DEVELOPMENT else self.otherwise


Parse = Callable[[Env, str, Any], Any]


def setting(parse: Parse, *, default: Any = MISSING, help: str, secret: bool = False) -> Any:
    """A field of Settings; without a default the variable is required."""
    return field(metadata={"parse": parse, "default": default, "help": help, "secret": secret})


def text(env: Env, name: str, default: Any) -> str:
    return str(env.str(name, default)).strip()


def host(env: Env, name: str, default: Any) -> str:
    """An address or a name to listen on. Empty would mean every address, unnoticed."""
    if not (given := text(env, name, default)):
        raise invalid(name, "Must be an address, such as 127.0.0.1 or ::1.")
    return given


def folder(env: Env, name: str, default: Any) -> Path:
    if not text(env, name, str(default)):
        raise invalid(name, "Must name a directory.")
    return Path(env.path(name, default))


def one_of(*choices: str) -> Parse:
    return lambda env, name, default: env.str(name, default, validate=validate.OneOf(choices))


def integer(low: int, high: int) -> Parse:
    return lambda env, name, default: env.int(name, default, validate=validate.Range(low, high))


def fraction(env: Env, name: str, default: Any) -> float:
    return float(env.float(name, default, validate=validate.Range(0, 1)))


def seconds(env: Env, name: str, default: Any) -> int:
    """A duration such as ``15m`` or ``7d`` (GEP-2257), in whole seconds."""
    parsed = env.timedelta(name, default)
    if parsed.total_seconds() < 1:
        raise invalid(name, "Must be at least 1s.")
    return int(parsed.total_seconds())


def names(env: Env, name: str, default: Any) -> tuple[str, ...]:
    return tuple(part.strip() for part in env.str(name, default).split(",") if part.strip())


def origins(env: Env, name: str, default: Any) -> tuple[str, ...]:
    """As browsers send them: ``scheme://host[:port]``, or ``*``."""
    found = names(env, name, default)
    for origin in found:
        if origin != "*" and not _is_origin(origin):
            raise invalid(name, f"{origin} is not like https://app.example.org")
    return found


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return bool(parts.netloc) and text == f"{parts.scheme}://{parts.netloc}"


def networks(env: Env, name: str, default: Any) -> tuple[Network, ...]:
    try:
        return tuple(ip_network(part) for part in names(env, name, default))
    except ValueError as error:
        raise invalid(name, f"{error}.") from error


def rate(env: Env, name: str, default: Any) -> limits.RateLimitItem | None:
    """In the notation of the limits library, ``10/15minutes``; ``off`` for none."""
    written = env.str(name, default).strip()
    if written == "off":
        return None
    try:
        [item] = limits.parse_many(written)
    except ValueError:
        raise invalid(name, "Must be one rate such as 10/15minutes, or off.") from None
    if item.amount < 1 or _NO_TIME.search(written):  # that library reads 0minutes as 1minute
        raise invalid(name, "Must allow at least 1 request in at least 1 second; off for no limit.")
    return item


_NO_TIME = re.compile(r"[/ ]0+\s*[a-z]", re.IGNORECASE)


def url(*schemes: str, database: bool = False) -> Parse:
    """One address with one of these schemes; with ``database``, it names one in its path."""

    def parse(env: Env, name: str, default: Any) -> str:
        return check_url(name, text(env, name, default), schemes, database=database)

    return parse


def urls(*schemes: str) -> Parse:
    def parse(env: Env, name: str, default: Any) -> tuple[str, ...]:
        return tuple(check_url(name, each, schemes, database=True) for each in names(env, name, default))

    return parse


def optional(parse: Parse) -> Parse:
    """The empty value, or what ``parse`` takes."""
    return lambda env, name, default: parse(env, name, default) if text(env, name, default) else ""


def check_url(name: str, value: str, schemes: tuple[str, ...], *, database: bool) -> str:
    try:
        parts = urlsplit(value)
        if "," not in parts.netloc:  # several hosts of PostgreSQL or MongoDB: their clients know these
            parts.port  # noqa: B018 - it raises where it is none
    except ValueError:  # its text shows part of the value, which may be part of a password
        raise invalid(
            name, "Must have a port up to 65535, IPv6 in brackets, and / : @ of a password as %2F %3A %40."
        ) from None
    if parts.scheme not in schemes:
        raise invalid(name, f"Must begin with {schemes[0]}://")
    if parts.scheme in ("http", "https") and not parts.hostname:
        raise invalid(name, "Must name a host.")
    if database and not parts.path.strip("/"):
        raise invalid(name, "Must name a database in its path.")
    return value


def authority(host: str, port: int) -> str:
    """Return ``host:port`` as a URL has it: an IPv6 address in brackets (RFC 3986)."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def redis_url(env: Env, name: str, default: Any) -> str:
    """REDIS_URL, else put together from REDIS_HOST, REDIS_PORT and REDIS_PASSWORD."""
    if env.str(name, None) is not None or not text(env, "REDIS_HOST", ""):
        return str(url("redis", "rediss", "unix")(env, name, default))
    address = authority(text(env, "REDIS_HOST", ""), integer(1, 65535)(env, "REDIS_PORT", 6379))
    password = env.str("REDIS_PASSWORD", "")
    login = f":{quote(password, safe='')}@" if password else ""
    return check_url("REDIS_HOST", f"redis://{login}{address}/0", ("redis",), database=False)


POSTGRES = ("postgresql", "postgres")


@dataclass(frozen=True, repr=False)
class Settings:
    """What a server or worker process needs to know; all of it, and nothing that changes later."""

    app_env: str = setting(
        one_of(DEVELOPMENT, TEST, PRODUCTION),
        default=DEVELOPMENT,
        help="`development`, `test` or `production`; production refuses unsafe settings",
    )
    host: str = setting(host, default="0.0.0.0", help="address to listen on (`127.0.0.1` in `run.py dev`)")  # noqa: S104
    port: int = setting(integer(0, 65535), default=3000, help="port to listen on; 0 picks a free one")
    database_url: str = setting(
        url(*POSTGRES, database=True),
        help="PostgreSQL 15+: `postgresql://user:password@host/db`",
        secret=True,
    )
    database_replica_urls: tuple[str, ...] = setting(
        urls(*POSTGRES), default="", help="comma list of replicas, for reads that may lag", secret=True
    )
    mongodb_uri: str = setting(
        url("mongodb", "mongodb+srv", database=True), help="MongoDB 7+, the database in the path", secret=True
    )
    redis_url: str = setting(
        redis_url,
        help="Redis 7+ or Valkey 8+; or `REDIS_HOST`, `REDIS_PORT` and `REDIS_PASSWORD` instead",
        secret=True,
    )
    jwt_secret: str = setting(
        text,
        default=PerEnvironment("development-access-secret-change-me!", ""),
        help="signs access tokens; at least 32 bytes",
        secret=True,
    )
    jwt_secret_previous: str = setting(
        text, default="", help="still accepted for access tokens while you rotate", secret=True
    )
    jwt_refresh_secret: str = setting(
        text,
        default=PerEnvironment("development-refresh-secret-change-me", ""),
        help="keys refresh tokens, their hashes and successors; differs from `JWT_SECRET`",
        secret=True,
    )
    jwt_refresh_secret_previous: str = setting(
        text, default="", help="still accepted for refresh tokens while you rotate", secret=True
    )
    access_token_ttl: int = setting(seconds, default=timedelta(minutes=15), help="lifetime of an access token")
    refresh_token_ttl: int = setting(seconds, default=timedelta(days=7), help="lifetime of a refresh token")
    bcrypt_rounds: int = setting(integer(4, 31), default=12, help="bcrypt cost, 4–31; production refuses less than 10")
    rate_limit_auth: limits.RateLimitItem | None = setting(
        rate, default="10/15minutes", help="register, login, password; per address; `off` for none"
    )
    rate_limit_refresh: limits.RateLimitItem | None = setting(
        rate, default="60/15minutes", help="refreshes of a session's tokens; per session; `off` for none"
    )
    rate_limit_account: limits.RateLimitItem | None = setting(
        rate, default="10/15minutes", help="failed password checks; per account or session; `off` for none"
    )
    rate_limit_default: limits.RateLimitItem | None = setting(
        rate, default="100/15minutes", help="all other `/api` requests; per user, or address; `off` for none"
    )
    trusted_proxies: tuple[Network, ...] = setting(
        networks, default="", help="comma list of addresses whose `X-Forwarded-For` is believed"
    )
    cors_origin: tuple[str, ...] = setting(
        origins,
        default=PerEnvironment("*", ""),
        help="comma list of origins; `*` only outside production",
    )
    job_fault_rate: float = setting(
        fraction, default=PerEnvironment(0.05, 0), help="part of the job attempts that fail on purpose"
    )
    worker_concurrency: int = setting(integer(1, 1000), default=10, help="jobs that one worker runs at once")
    jobs_per_user: int = setting(
        integer(1, 1000), default=4, help="attempts of one user queued or running, over all workers"
    )
    ws_frames_per_second: int = setting(integer(1, 100_000), default=100, help="frames a socket may send per second")
    ws_burst: int = setting(integer(1, 100_000), default=200, help="frames a socket may send at once")
    ws_max_message_bytes: int = setting(
        integer(1024, 64 << 20), default=256 << 10, help="largest frame of a JSON client"
    )
    ws_outbox_frames: int = setting(integer(8, 1_000_000), default=256, help="frames that may wait for a slow socket")
    ws_outbox_bytes: int = setting(
        integer(64 << 10, 1 << 30), default=4 << 20, help="bytes that may wait for a slow socket"
    )
    history_events: int = setting(
        integer(10, 100_000), default=1000, help="newest events kept of each workspace, for 24 h"
    )
    history_bytes: int = setting(
        integer(1 << 20, 1 << 30), default=16 << 20, help="bytes of events kept of each workspace"
    )
    drain_seconds: int = setting(integer(0, 3600), default=10, help="time that a stopping server gives its sockets")
    ops_username: str = setting(text, default="", help="Basic credentials for `/metrics` and `/ops/queues`")
    ops_password: str = setting(text, default="", help="the same; unset, both answer 404 in production", secret=True)
    metrics_port: int = setting(
        integer(0, 65535), default=0, help="port of a worker's own `/health` and `/metrics`; 0 for none"
    )
    otel_exporter_otlp_endpoint: str = setting(
        optional(url("http", "https")),
        default="",
        help="collector of OpenTelemetry traces, OTLP over HTTP; needs the extra `otel`",
    )
    log_level: str = setting(
        one_of("debug", "info", "warning", "error"),
        default="info",
        help="`debug`, `info`, `warning`, `error`",
    )
    log_format: str = setting(one_of("text", "json"), default=PerEnvironment("text", "json"), help="`text` or `json`")
    data_dir: Path = setting(
        folder,
        default=Path(".data"),
        help="where `run.py dev` keeps its data",
    )

    def __repr__(self) -> str:
        shown = (f"{f.name}={'***' if f.metadata['secret'] else getattr(self, f.name)!r}" for f in fields(self))
        return f"Settings({', '.join(shown)})"

    @property
    def production(self) -> bool:
        return self.app_env == PRODUCTION


def load() -> Settings:
    """All settings from the environment.

    Raises:
        SettingsError: one is missing or bad.
    """
    env = _environment()
    app_env = _value(_field("app_env"), env, DEVELOPMENT)
    settings = Settings(**{f.name: _value(f, env, app_env) for f in fields(Settings)})
    for problem in _problems(settings):
        raise SettingsError(problem)
    return settings


@dataclass(frozen=True)
class StackSettings:
    """What ``run.py dev`` needs: it brings its own stores and secrets."""

    data_dir: Path
    host: str
    port: int


def load_stack() -> StackSettings:
    """The few settings that come before the stores' addresses are known.

    Raises:
        SettingsError: one is bad.
    """
    env = _environment()
    return StackSettings(
        data_dir=_value(_field("data_dir"), env, DEVELOPMENT),
        host=_parsed(host, env, "HOST", "127.0.0.1"),
        port=_value(_field("port"), env, DEVELOPMENT),
    )


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a process that we start: ours, with these changes."""
    return {**os.environ, **changes}


def metrics_folder() -> str | None:
    """Where the processes of a supervisor, which names it, count together (prometheus_client's own variable)."""
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR")


def table() -> Iterator[tuple[str, str, str]]:
    """Variable, default as one writes it, and help: the table in docs/reference.md and ``.env.example``."""
    for each in fields(Settings):
        yield each.name.upper(), _written(each), each.metadata["help"]


def _written(each: Field[Any]) -> str:
    match each.metadata["default"]:
        case default if default is MISSING:
            return "required"
        case PerEnvironment() if each.metadata["secret"]:
            return "required outside development"
        case PerEnvironment(development, otherwise):
            return f"`{development}` in development, else {f'`{otherwise}`' if otherwise != '' else 'none'}"
        case timedelta() as duration:
            return f"`{duration.days}d`" if duration.days else f"`{duration.seconds // 60}m`"
        case "":
            return "none"
        case default:
            return f"`{default}`"


def _environment() -> Env:
    env = Env()
    if os.environ.get("APP_ENV", DEVELOPMENT) == DEVELOPMENT and Path(".env").is_file():
        try:
            env.read_env(".env", recurse=False)  # seen by this reader only; the environment wins
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"The file .env cannot be read: {error}") from error
    return env


def _field(name: str) -> Field[Any]:
    return next(f for f in fields(Settings) if f.name == name)


def _value(each: Field[Any], env: Env, app_env: str) -> Any:
    default = each.metadata["default"]
    if isinstance(default, PerEnvironment):
        default = default.choose(app_env)
    # environs takes Ellipsis for "required".
    return _parsed(each.metadata["parse"], env, each.name.upper(), ... if default is MISSING else default)


def _parsed(parse: Parse, env: Env, name: str, default: Any) -> Any:
    try:
        os.environ.get(name, "").encode()
        return parse(env, name, default)
    except EnvValidationError as error:
        variable = str(error).split('"')[1]  # REDIS_URL has parts with names of their own
        raise invalid(variable, " ".join(error.error_messages)) from error
    except EnvError as error:
        raise SettingsError(str(error)) from error
    except UnicodeEncodeError:
        raise invalid(name, "Must be UTF-8.") from None


def _problems(settings: Settings) -> Iterator[str]:
    """What may not be, setting by setting; the first one stops the start."""
    if settings.jwt_secret == settings.jwt_refresh_secret and settings.jwt_secret:
        yield 'Environment variable "JWT_REFRESH_SECRET" invalid: Must differ from JWT_SECRET.'
    for name in ("jwt_secret", "jwt_refresh_secret", "jwt_secret_previous", "jwt_refresh_secret_previous"):
        yield from _secret_problems(settings, name)
    if bool(settings.ops_username) != bool(settings.ops_password):
        yield 'Environment variable "OPS_PASSWORD" invalid: Set OPS_USERNAME and OPS_PASSWORD together.'
    if settings.production:
        if settings.bcrypt_rounds < MINIMUM_PRODUCTION_ROUNDS:
            yield 'Environment variable "BCRYPT_ROUNDS" invalid: Must be at least 10 in production.'
        if "*" in settings.cors_origin:
            yield 'Environment variable "CORS_ORIGIN" invalid: Must not be * in production.'


def _secret_problems(settings: Settings, name: str) -> Iterator[str]:
    value: str = getattr(settings, name)
    variable = name.upper()
    if not value:
        if not name.endswith("_previous"):
            yield f'Environment variable "{variable}" not set'
    elif len(value.encode()) < MINIMUM_SECRET_BYTES:
        yield f'Environment variable "{variable}" invalid: Must have at least {MINIMUM_SECRET_BYTES} bytes.'
    elif settings.production and value in _published_secrets():
        yield f'Environment variable "{variable}" invalid: Must not be the published development secret.'


def _published_secrets() -> Mapping[str, str]:
    return {
        f.metadata["default"].development: f.name
        for f in fields(Settings)
        if f.metadata["secret"] and isinstance(f.metadata["default"], PerEnvironment)
    }
