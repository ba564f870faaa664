"""The REST endpoints of jobs."""

import hashlib
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any
from urllib.parse import quote
from uuid import UUID

from aiohttp import hdrs, web
from aiohttp_apispec import docs, json_schema, querystring_schema, response_schema

from server import fields, json, tracing
from server.auth.store import name_of_session
from server.errors import Conflict, FieldError, Gone, NotFound, RangeNotSatisfiable, ValidationFailed, invalid
from server.jobs import artifacts, bell, files, output, schemas, store
from server.jobs.announcements import Announcements
from server.jobs.dispatch import Dispatcher
from server.jobs.store import Job
from server.jobs.types import JOB_TYPES
from server.jobs.workers import Roster
from server.projects import access
from server.projects.access import ACCESS, Kind, Requirement, Role, named, requires
from server.resources import answered, reported
from server.rest import answers
from server.rest.etags import unchanged
from server.rest.idempotency import REPLAYED, idempotency_key
from server.rest.keys import BODY, HEADERS, QUERY, RESOURCES, USER
from server.rest.marks import Idempotency, idempotent, refuses
from server.rest.pages import cursor_of, keys_of, page_of

routes = web.RouteTableDef()
DISPATCHER = web.AppKey("dispatcher", Dispatcher)
ANNOUNCEMENTS = web.AppKey("announcements", Announcements)
ROSTER = web.AppKey("roster", Roster)
MOST_RACES = 20  # retries after a lost race; more than that does not occur in practice
_IN_PAYLOAD = Requirement(Role.COLLABORATOR, named("documentId", "workspaceId", "projectId"))


@routes.post("/api/v1/jobs")
@docs(tags=["jobs"], summary="Submit a job")
@json_schema(schemas.NewJob)
@response_schema(schemas.JobAnswer, 201)
@refuses("language_unavailable", "sandbox_unavailable")
@idempotent(Idempotency.BY_ITSELF)
@requires(Role.COLLABORATOR, of=named("workspaceId", "projectId"))
async def create_job(request: web.Request) -> web.Response:
    body, mongo = request[BODY], request.app[RESOURCES].mongo
    key, body_hash = _idempotency_key(request, body), store.hash_of(body)
    async with answered(request.app[RESOURCES].mongo):
        # Before all other checks: a repeated request must not fail because of later changes.
        earlier = await store.under_key(mongo, user=request[USER].id, key=key, body_hash=body_hash)
    job, duplicate = (earlier, True) if earlier else await _create(request, body, key, body_hash)
    answer = {"job": store.shown(job), "duplicate": duplicate}
    if duplicate:
        return answers.json(answer, headers={REPLAYED: "true"})
    await request.app[ANNOUNCEMENTS].moved(job)
    await _admit(request, job)
    return answers.created(f"/api/v1/jobs/{job['_id']}", answer)


async def _create(request: web.Request, body: dict[str, Any], key: str | None, body_hash: str) -> tuple[Job, bool]:
    payload = _checked_payload(body["type"], body["payload"])
    project, workspace = await _place(request, body, payload)
    if language := JOB_TYPES[body["type"]].needs(body["payload"]):
        await request.app[ROSTER].demand(language)
    name = await _name(request) if workspace else ""
    async with answered(request.app[RESOURCES].mongo):
        return await store.create(
            request.app[RESOURCES].mongo,
            user=request[USER].id,
            user_name=name,
            type=body["type"],
            payload=body["payload"],
            priority=body["priority"],
            project=project,
            workspace=workspace,
            run_at=body["run_at"],
            idempotency_key=key,
            body_hash=body_hash,
            slots=request.app[DISPATCHER].slots,
            trace=tracing.here(),
            now=store.moment(),
        )


async def _admit(request: web.Request, job: Job) -> None:
    """Enqueue a job, after its announcement: a fast worker may announce the next status at once."""
    with reported():
        await request.app[DISPATCHER].admit(job)


@routes.get("/api/v1/jobs")
@docs(tags=["jobs"], summary="List your jobs, or those of a project or workspace, newest first")
@querystring_schema(schemas.JobsQuery)
@response_schema(page_of(schemas.Job), 200)
@requires(Role.VIEWER, of=named("workspaceId", "projectId"))
async def list_jobs(request: web.Request) -> web.Response:
    query = request[QUERY]
    async with answered(request.app[RESOURCES].mongo):
        jobs, more = await store.list_jobs(
            request.app[RESOURCES].mongo,
            user=request[USER].id,
            project=query["project_id"],
            workspace=query["workspace_id"],
            status=query["status"],
            type=query["type"],
            limit=query["limit"],
            after=keys_of(query["cursor"], datetime, str, of="jobs"),
        )
    cursor = cursor_of(jobs[-1]["createdAt"].isoformat(), jobs[-1]["_id"], of="jobs") if more else None
    return answers.json({"items": [store.shown(job) for job in jobs], "nextCursor": cursor})


@routes.get("/api/v1/jobs/stats")
@docs(tags=["jobs"], summary="Count your jobs by status, and all users' jobs in the queues")
@response_schema(schemas.Stats, 200)
async def read_stats(request: web.Request) -> web.Response:
    async with answered(request.app[RESOURCES].mongo):
        by_status, queued = await store.count(request.app[RESOURCES].mongo, user=request[USER].id, now=store.moment())
    with reported():
        workers = await request.app[ROSTER].workers()
    return answers.json({"user": by_status, "queue": {**queued, "workers": len(workers)}})


@routes.get("/api/v1/jobs/{jobId}")
@docs(tags=["jobs"], summary="Read a job")
@response_schema(schemas.Job, 200)
@refuses("not_found")
async def read_job(request: web.Request) -> web.Response:
    raw = json.dumps(store.shown(await _visible(request)))
    return answers.tagged(request, raw, tag=hashlib.sha256(raw).hexdigest()[:32])


@routes.get("/api/v1/jobs/{jobId}/logs")
@docs(tags=["jobs"], summary="Read a job's output; repeat with `after=nextCursor` until `complete`")
@querystring_schema(schemas.LogsQuery)
@response_schema(schemas.Logs, 200)
@refuses("not_found")
async def read_logs(request: web.Request) -> web.Response:
    job = await _visible(request)
    query = request[QUERY]
    after = query["after"] if query["cursor"] is None else query["cursor"]
    async with answered(request.app[RESOURCES].mongo):
        items, end = await output.read(request.app[RESOURCES].mongo, job=job["_id"], after=after, limit=query["limit"])
    # The job was read before its output: if it had ended then, there is no more output than this.
    complete = store.has_settled(job, now=store.moment()) and len(items) < query["limit"]
    return answers.json({"items": items, "nextCursor": None if complete else str(end), "complete": complete})


@routes.post("/api/v1/jobs/{jobId}/cancel")
@docs(tags=["jobs"], summary="Cancel a job that has not ended; its processes end within 2 s")
@response_schema(schemas.Job, 200)
@refuses("not_found", "forbidden", "not_cancellable")
async def cancel_job(request: web.Request) -> web.Response:
    stores = request.app[RESOURCES]

    async def move(job: Job) -> bool:
        if job["status"] not in (store.PENDING, store.PROCESSING):
            raise Conflict(f"Job has already ended: {job['status']}", code="not_cancellable")
        was_processing, slot = job["status"] == store.PROCESSING, job["slot"]
        if not await store.cancel(stores.mongo, job=job, now=store.moment()):
            return False
        if was_processing:
            await bell.tell_cancelled(stores.redis, job=job["_id"])
        await request.app[DISPATCHER].hand_on(job["userId"], slot)
        return True

    job = await _move(request, move)
    return answers.json(store.shown(job))


@routes.post("/api/v1/jobs/{jobId}/retry")
@docs(tags=["jobs"], summary="Retry a failed or cancelled job")
@response_schema(schemas.Job, 202)
@refuses("not_found", "forbidden", "not_retryable")
async def retry_job(request: web.Request) -> web.Response:
    async def move(job: Job) -> bool:
        if job["status"] not in (store.FAILED, store.CANCELLED):
            raise Conflict(
                f"Only a failed or cancelled job can be retried: it is {job['status']}", code="not_retryable"
            )
        return await store.start_anew(request.app[RESOURCES].mongo, job=job, now=store.moment())

    job = await _move(request, move)
    await _admit(request, job)
    return answers.json(store.shown(job), status=202)


@routes.get("/api/v1/jobs/{jobId}/artifacts/{name}")
@docs(
    tags=["jobs"],
    summary="Download a file that a job produced; supports `Range`",
    produces=["application/octet-stream"],
    responses={200: {"description": "the file"}, 206: {"description": "the requested part of the file"}},
)
@refuses("not_found", "gone", "range_not_satisfiable")
async def read_artifact(request: web.Request) -> web.StreamResponse:
    job, name = await _visible(request), request.match_info["name"]
    artifact = (job["result"] or {}).get("artifact") if job["status"] == store.COMPLETED else None
    if artifact is None or artifact["name"] != name:
        raise NotFound("Artifact not found")
    mongo = request.app[RESOURCES].mongo
    async with answered(request.app[RESOURCES].mongo):
        file = await artifacts.find(mongo, job=job, name=name)
    if file is None or artifact["expiresAt"] <= store.moment():
        raise Gone("Artifact has expired")
    tag = artifact["sha256"]
    if unchanged(request, tag):
        return web.Response(status=304, headers={"ETag": f'"{tag}"'})
    start, stop, status = _range(request, file["length"], tag)
    response = web.StreamResponse(status=status, headers=_file_headers(file, tag))
    if status == web.HTTPPartialContent.status_code:
        response.headers[hdrs.CONTENT_RANGE] = f"bytes {start}-{stop - 1}/{file['length']}"
    response.content_length = stop - start
    await response.prepare(request)
    if request.method != hdrs.METH_HEAD:
        async for data in artifacts.chunks(mongo, file=file, start=start, stop=stop):
            await response.write(data)
    await response.write_eof()
    return response


def _range(request: web.Request, length: int, tag: str) -> tuple[int, int, int]:
    """Return start, stop and status of the response (RFC 9110, a single range)."""
    header = request.headers.get(hdrs.RANGE, "")
    if request.headers.get(hdrs.IF_RANGE, f'"{tag}"') != f'"{tag}"' or not header.startswith("bytes="):
        return 0, length, 200
    try:
        start, stop, _ = request.http_range.indices(length)
    except ValueError:
        return 0, length, 200  # several ranges, or a malformed one: RFC 9110 allows the whole file
    if start >= stop:
        request[HEADERS]["Content-Range"] = f"bytes */{length}"
        raise RangeNotSatisfiable(f"Range is outside the file of {length} bytes")
    return start, stop, 206


def _file_headers(file: Any, tag: str) -> dict[str, str]:
    return {
        hdrs.ETAG: f'"{tag}"',
        hdrs.ACCEPT_RANGES: "bytes",
        hdrs.CONTENT_TYPE: file["metadata"]["contentType"],
        hdrs.CONTENT_DISPOSITION: f"attachment; filename*=UTF-8''{quote(file['filename'])}",
    }


async def _visible(request: web.Request, *, role: Role = Role.VIEWER) -> Job:
    """Return the job of the path, for its owner and for the members of its project with the role.

    Raises:
        NotFound: the job does not exist, or the caller may not see it.
        Forbidden: the caller's role in the project is too low.
    """
    id = fields.parse_id(request.match_info["jobId"])
    async with answered(request.app[RESOURCES].mongo):
        job = await store.read(request.app[RESOURCES].mongo, job=str(id)) if id else None
    if job is None:
        raise NotFound("Job not found")
    if job["userId"] != str(request[USER].id):
        if job["projectId"] is None:
            raise NotFound("Job not found")
        await _check(request, Kind.PROJECT, UUID(job["projectId"]), role)
    return job


async def _check(request: web.Request, kind: Kind, id: UUID, role: Role) -> access.Access:
    return await access.check(request.app[RESOURCES].db, user=request[USER].id, kind=kind, id=id, role=role)


async def _move(request: web.Request, move: Callable[[Job], Awaitable[bool]]) -> Job:
    """Change the state of the job and return it; read it again if a worker changed it in between."""
    for _ in range(MOST_RACES):
        job = await _visible(request, role=Role.COLLABORATOR)
        with reported():
            moved = await move(job)
        if moved:
            await request.app[ANNOUNCEMENTS].moved(job)
            return job
    raise Conflict("Job was changed concurrently too many times")


async def _place(
    request: web.Request, body: dict[str, Any], payload: dict[str, Any]
) -> tuple[UUID | None, UUID | None]:
    """Return project and workspace of the job: request and payload must refer to the same ones."""
    db = request.app[RESOURCES].db
    granted = request.get(ACCESS)
    inner = await access.check_named(db, _IN_PAYLOAD, user=request[USER].id, values=payload)
    if granted and inner and granted.project != inner.project:
        raise invalid("payload", "Must refer to the project of the request.")
    workspaces = {body["workspace_id"], payload.get("workspace_id")}
    if document := payload.get("document_id"):
        workspaces.add(await files.workspace_of(db, document=document))
    workspaces.discard(None)
    if len(workspaces) > 1:
        raise invalid("workspaceId", "Must be the workspace that the payload and its document refer to.")
    scope = granted or inner
    return scope.project if scope else None, next(iter(workspaces), None)


async def _name(request: web.Request) -> str:
    user = request[USER]
    return await name_of_session(request.app[RESOURCES].db, session=user.session, user=user.id) or ""


def _checked_payload(type: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Return the payload as the schema of its type loads it."""
    try:
        return fields.load(JOB_TYPES[type].schema, payload)
    except ValidationFailed as error:
        details = [
            FieldError(field=f"payload.{detail['field']}".rstrip("."), message=detail["message"])
            for detail in error.details
        ]
        raise ValidationFailed("Validation failed", details=details) from None


def _idempotency_key(request: web.Request, body: dict[str, Any]) -> str | None:
    header = idempotency_key(request)
    in_body: str | None = body["idempotency_key"]
    if header is not None and in_body not in (None, header):
        raise invalid("idempotencyKey", "Must equal the Idempotency-Key header.")
    return in_body or header
