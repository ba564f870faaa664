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
from server.auth.store import user_name_of_session
from server.errors import Conflict, FieldError, Gone, NotFound, RangeNotSatisfiable, ValidationFailed, invalid_field
from server.jobs import artifacts, notifier, output, schemas, store, workspace_files
from server.jobs.announcements import Announcements
from server.jobs.dispatch import Dispatcher
from server.jobs.store import JobRecord
from server.jobs.types import JOB_TYPES
from server.jobs.worker_registry import WorkerRegistry
from server.projects import access
from server.projects.access import ACCESS, Requirement, ResourceKind, Role, requires, resource_ids
from server.resources import translate_mongo_errors, translate_store_errors
from server.rest import responses
from server.rest.etags import is_not_modified
from server.rest.idempotency import REPLAYED_HEADER, idempotency_key
from server.rest.keys import BODY, QUERY, RESOURCES, RESPONSE_HEADERS, USER
from server.rest.marks import Idempotency, error_codes, idempotent
from server.rest.pagination import decode_cursor, encode_cursor, page_schema

routes = web.RouteTableDef()
DISPATCHER = web.AppKey("dispatcher", Dispatcher)
ANNOUNCEMENTS = web.AppKey("announcements", Announcements)
WORKER_REGISTRY = web.AppKey("worker_registry", WorkerRegistry)
MAX_CONFLICT_RETRIES = 20  # after a write conflict with a worker; so many in a row do not occur in practice
_PAYLOAD_REQUIREMENT = Requirement(Role.COLLABORATOR, resource_ids("documentId", "workspaceId", "projectId"))


@routes.post("/api/v1/jobs")
@docs(tags=["jobs"], summary="Submit a job")
@json_schema(schemas.NewJob)
@response_schema(schemas.JobAnswer, 201)
@error_codes("language_unavailable", "sandbox_unavailable")
@idempotent(Idempotency.BY_HANDLER)
@requires(Role.COLLABORATOR, of=resource_ids("workspaceId", "projectId"))
async def create_job(request: web.Request) -> web.Response:
    body, mongo = request[BODY], request.app[RESOURCES].mongo
    key, body_hash = _idempotency_key(request, body), store.hash_body(body)
    async with translate_mongo_errors(request.app[RESOURCES].mongo):
        # Before all other checks: a repeated request must not fail because of later changes.
        earlier = await store.find_by_idempotency_key(mongo, user=request[USER].id, key=key, body_hash=body_hash)
    job, duplicate = (earlier, True) if earlier else await _create(request, body, key, body_hash)
    response_body = {"job": store.client_view(job), "duplicate": duplicate}
    if duplicate:
        return responses.json(response_body, headers={REPLAYED_HEADER: "true"})
    await request.app[ANNOUNCEMENTS].announce_status(job)
    await _admit(request, job)
    return responses.created(f"/api/v1/jobs/{job['_id']}", response_body)


async def _create(
    request: web.Request, body: dict[str, Any], key: str | None, body_hash: str
) -> tuple[JobRecord, bool]:
    payload = _load_payload(body["type"], body["payload"])
    project, workspace = await _resolve_scope(request, body, payload)
    if language := JOB_TYPES[body["type"]].required_language(body["payload"]):
        await request.app[WORKER_REGISTRY].require_language(language)
    name = await _read_user_name(request) if workspace else ""
    async with translate_mongo_errors(request.app[RESOURCES].mongo):
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
            traceparent=tracing.current_traceparent(),
            now=store.mongo_now(),
        )


async def _admit(request: web.Request, job: JobRecord) -> None:
    """Enqueue a job, after its announcement: a fast worker may announce the next status at once."""
    with translate_store_errors():
        await request.app[DISPATCHER].admit(job)


@routes.get("/api/v1/jobs")
@docs(tags=["jobs"], summary="List your jobs, or those of a project or workspace, newest first")
@querystring_schema(schemas.JobsQuery)
@response_schema(page_schema(schemas.Job), 200)
@requires(Role.VIEWER, of=resource_ids("workspaceId", "projectId"))
async def list_jobs(request: web.Request) -> web.Response:
    query = request[QUERY]
    async with translate_mongo_errors(request.app[RESOURCES].mongo):
        jobs, more = await store.list_jobs(
            request.app[RESOURCES].mongo,
            user=request[USER].id,
            project=query["project_id"],
            workspace=query["workspace_id"],
            status=query["status"],
            type=query["type"],
            limit=query["limit"],
            after=decode_cursor(query["cursor"], datetime, str, list_name="jobs"),
        )
    cursor = encode_cursor(jobs[-1]["createdAt"].isoformat(), jobs[-1]["_id"], list_name="jobs") if more else None
    return responses.json({"items": [store.client_view(job) for job in jobs], "nextCursor": cursor})


@routes.get("/api/v1/jobs/stats")
@docs(tags=["jobs"], summary="Count your jobs by status, and all users' jobs in the queues")
@response_schema(schemas.Stats, 200)
async def read_stats(request: web.Request) -> web.Response:
    async with translate_mongo_errors(request.app[RESOURCES].mongo):
        by_status, queued = await store.count_by_status(
            request.app[RESOURCES].mongo, user=request[USER].id, now=store.mongo_now()
        )
    with translate_store_errors():
        workers = await request.app[WORKER_REGISTRY].workers()
    return responses.json({"user": by_status, "queue": {**queued, "workers": len(workers)}})


@routes.get("/api/v1/jobs/{jobId}")
@docs(tags=["jobs"], summary="Read a job")
@response_schema(schemas.Job, 200)
@error_codes("not_found")
async def read_job(request: web.Request) -> web.Response:
    raw = json.dumps(store.client_view(await _read_authorized(request)))
    return responses.with_etag(request, raw, tag=hashlib.sha256(raw).hexdigest()[:32])


@routes.get("/api/v1/jobs/{jobId}/logs")
@docs(tags=["jobs"], summary="Read a job's output; repeat with `after=nextCursor` until `complete`")
@querystring_schema(schemas.LogsQuery)
@response_schema(schemas.Logs, 200)
@error_codes("not_found")
async def read_logs(request: web.Request) -> web.Response:
    job = await _read_authorized(request)
    query = request[QUERY]
    after = query["after"] if query["cursor"] is None else query["cursor"]
    async with translate_mongo_errors(request.app[RESOURCES].mongo):
        items, end = await output.read(request.app[RESOURCES].mongo, job=job["_id"], after=after, limit=query["limit"])
    # The job was read before its output: if it had ended then, there is no more output than this.
    complete = store.is_output_complete(job, now=store.mongo_now()) and len(items) < query["limit"]
    return responses.json({"items": items, "nextCursor": None if complete else str(end), "complete": complete})


@routes.post("/api/v1/jobs/{jobId}/cancel")
@docs(tags=["jobs"], summary="Cancel a job that has not ended; its processes end within 2 s")
@response_schema(schemas.Job, 200)
@error_codes("not_found", "forbidden", "not_cancellable")
async def cancel_job(request: web.Request) -> web.Response:
    stores = request.app[RESOURCES]

    async def transition(job: JobRecord) -> bool:
        if job["status"] not in (store.PENDING, store.PROCESSING):
            raise Conflict(f"Job has already ended: {job['status']}", code="not_cancellable")
        was_processing, slot = job["status"] == store.PROCESSING, job["slot"]
        if not await store.cancel(stores.mongo, job=job, now=store.mongo_now()):
            return False
        if was_processing:
            await notifier.publish_cancellation(stores.redis, job=job["_id"])
        await request.app[DISPATCHER].release_slot(job["userId"], slot)
        return True

    job = await _transition(request, transition)
    return responses.json(store.client_view(job))


@routes.post("/api/v1/jobs/{jobId}/retry")
@docs(tags=["jobs"], summary="Retry a failed or cancelled job")
@response_schema(schemas.Job, 202)
@error_codes("not_found", "forbidden", "not_retryable")
async def retry_job(request: web.Request) -> web.Response:
    async def transition(job: JobRecord) -> bool:
        if job["status"] not in (store.FAILED, store.CANCELLED):
            raise Conflict(
                f"Only a failed or cancelled job can be retried: it is {job['status']}", code="not_retryable"
            )
        return await store.retry(request.app[RESOURCES].mongo, job=job, now=store.mongo_now())

    job = await _transition(request, transition)
    await _admit(request, job)
    return responses.json(store.client_view(job), status=202)


@routes.get("/api/v1/jobs/{jobId}/artifacts/{name}")
@docs(
    tags=["jobs"],
    summary="Download a file that a job produced; supports `Range`",
    produces=["application/octet-stream"],
    responses={200: {"description": "the file"}, 206: {"description": "the requested part of the file"}},
)
@error_codes("not_found", "gone", "range_not_satisfiable")
async def read_artifact(request: web.Request) -> web.StreamResponse:
    job, name = await _read_authorized(request), request.match_info["name"]
    artifact = (job["result"] or {}).get("artifact") if job["status"] == store.COMPLETED else None
    if artifact is None or artifact["name"] != name:
        raise NotFound("Artifact not found")
    mongo = request.app[RESOURCES].mongo
    async with translate_mongo_errors(request.app[RESOURCES].mongo):
        file = await artifacts.find_file(mongo, job=job, name=name)
    if file is None or artifact["expiresAt"] <= store.mongo_now():
        raise Gone("Artifact has expired")
    tag = artifact["sha256"]
    if is_not_modified(request, tag):
        return web.Response(status=304, headers={"ETag": f'"{tag}"'})
    start, stop, status = _parse_range(request, file["length"], tag)
    response = web.StreamResponse(status=status, headers=_file_headers(file, tag))
    if status == web.HTTPPartialContent.status_code:
        response.headers[hdrs.CONTENT_RANGE] = f"bytes {start}-{stop - 1}/{file['length']}"
    response.content_length = stop - start
    await response.prepare(request)
    if request.method != hdrs.METH_HEAD:
        async for data in artifacts.read_chunks(mongo, file=file, start=start, stop=stop):
            await response.write(data)
    await response.write_eof()
    return response


def _parse_range(request: web.Request, length: int, tag: str) -> tuple[int, int, int]:
    """Return start, stop and status of the response (RFC 9110, a single range)."""
    header = request.headers.get(hdrs.RANGE, "")
    if request.headers.get(hdrs.IF_RANGE, f'"{tag}"') != f'"{tag}"' or not header.startswith("bytes="):
        return 0, length, 200
    try:
        start, stop, _ = request.http_range.indices(length)
    except ValueError:
        return 0, length, 200  # several ranges, or a malformed one: RFC 9110 allows the whole file
    if start >= stop:
        request[RESPONSE_HEADERS]["Content-Range"] = f"bytes */{length}"
        raise RangeNotSatisfiable(f"Range is outside the file of {length} bytes")
    return start, stop, 206


def _file_headers(file: Any, tag: str) -> dict[str, str]:
    return {
        hdrs.ETAG: f'"{tag}"',
        hdrs.ACCEPT_RANGES: "bytes",
        hdrs.CONTENT_TYPE: file["metadata"]["contentType"],
        hdrs.CONTENT_DISPOSITION: f"attachment; filename*=UTF-8''{quote(file['filename'])}",
    }


async def _read_authorized(request: web.Request, *, role: Role = Role.VIEWER) -> JobRecord:
    """Return the job of the path, for its owner and for the members of its project with the role.

    Raises:
        NotFound: the job does not exist, or the caller may not see it.
        Forbidden: the caller's role in the project is too low.
    """
    id = fields.parse_id(request.match_info["jobId"])
    async with translate_mongo_errors(request.app[RESOURCES].mongo):
        job = await store.read(request.app[RESOURCES].mongo, job=str(id)) if id else None
    if job is None:
        raise NotFound("Job not found")
    if job["userId"] != str(request[USER].id):
        if job["projectId"] is None:
            raise NotFound("Job not found")
        await _check_role(request, ResourceKind.PROJECT, UUID(job["projectId"]), role)
    return job


async def _check_role(request: web.Request, kind: ResourceKind, id: UUID, role: Role) -> access.Access:
    return await access.check(request.app[RESOURCES].db, user=request[USER].id, kind=kind, id=id, role=role)


async def _transition(request: web.Request, transition: Callable[[JobRecord], Awaitable[bool]]) -> JobRecord:
    """Change the state of the job and return it; read it again if a worker changed it in between."""
    for _ in range(MAX_CONFLICT_RETRIES):
        job = await _read_authorized(request, role=Role.COLLABORATOR)
        with translate_store_errors():
            changed = await transition(job)
        if changed:
            await request.app[ANNOUNCEMENTS].announce_status(job)
            return job
    raise Conflict("Job was changed concurrently too many times")


async def _resolve_scope(
    request: web.Request, body: dict[str, Any], payload: dict[str, Any]
) -> tuple[UUID | None, UUID | None]:
    """Return project and workspace of the job: request and payload must refer to the same ones."""
    db = request.app[RESOURCES].db
    granted = request.get(ACCESS)
    inner = await access.check_payload(db, _PAYLOAD_REQUIREMENT, user=request[USER].id, values=payload)
    if granted and inner and granted.project != inner.project:
        raise invalid_field("payload", "Must refer to the project of the request.")
    workspaces = {body["workspace_id"], payload.get("workspace_id")}
    if document := payload.get("document_id"):
        workspaces.add(await workspace_files.workspace_of(db, document=document))
    workspaces.discard(None)
    if len(workspaces) > 1:
        raise invalid_field("workspaceId", "Must be the workspace that the payload and its document refer to.")
    scope = granted or inner
    return scope.project if scope else None, next(iter(workspaces), None)


async def _read_user_name(request: web.Request) -> str:
    user = request[USER]
    return await user_name_of_session(request.app[RESOURCES].db, session=user.session, user=user.id) or ""


def _load_payload(type: str, payload: dict[str, Any]) -> dict[str, Any]:
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
        raise invalid_field("idempotencyKey", "Must equal the Idempotency-Key header.")
    return in_body or header
