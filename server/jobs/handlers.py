"""Jobs over REST."""

from typing import Any
from uuid import UUID

import structlog
from aiohttp import web
from aiohttp_apispec import docs, json_schema, response_schema
from redis.exceptions import RedisError
from saq.queue.redis import RedisQueue

from server import fields
from server.errors import FieldError, NotFound, ServiceError, ValidationFailed, invalid
from server.jobs import queue, schemas, store
from server.jobs.types import JOB_TYPES
from server.projects import access
from server.projects.access import ACCESS, Kind, Role, named, requires
from server.resources import reported
from server.rest import answers
from server.rest.keys import BODY, RESOURCES, USER
from server.rest.marks import refuses

routes = web.RouteTableDef()
QUEUE = web.AppKey("queue", RedisQueue)
log = structlog.get_logger()


@routes.post("/api/v1/jobs")
@docs(tags=["jobs"], summary="Ask for a job")
@json_schema(schemas.NewJob)
@response_schema(schemas.JobAnswer, 201)
@refuses("idempotency_key_reused")
@requires(Role.COLLABORATOR, of=named("workspaceId", "projectId"))
async def create_job(request: web.Request) -> web.Response:
    body = request[BODY]
    payload = _checked_payload(body["type"], body["payload"])
    project = request[ACCESS].project if ACCESS in request else None
    with reported():
        job, duplicate = await store.create(
            request.app[RESOURCES].mongo,
            user=request[USER].id,
            type=body["type"],
            payload=payload,
            priority=body["priority"],
            project=project,
            workspace=body["workspace_id"],
            run_at=body["run_at"],
            idempotency_key=_idempotency_key(request, body),
            now=store.moment(),
        )
    if not duplicate:
        await _send(request, job)
    answer = {"job": store.shown(job), "duplicate": duplicate}
    return answers.json(answer) if duplicate else answers.created(f"/api/v1/jobs/{job['_id']}", answer)


@routes.get("/api/v1/jobs/{jobId}")
@docs(tags=["jobs"], summary="One job")
@response_schema(schemas.Job, 200)
@refuses("not_found")
async def read_job(request: web.Request) -> web.Response:
    return answers.json(store.shown(await _visible(request)))


async def _visible(request: web.Request) -> dict[str, Any]:
    """The job of the path, for its owner and the members of its project."""
    id = fields.parse_id(request.match_info["jobId"])
    with reported():
        job = await store.read(request.app[RESOURCES].mongo, job=str(id)) if id else None
    if job is None:
        raise NotFound("No such job")
    if job["userId"] != str(request[USER].id):
        if job["projectId"] is None:
            raise NotFound("No such job")
        await _check(request, Kind.PROJECT, UUID(job["projectId"]), Role.VIEWER)
    return job


async def _check(request: web.Request, kind: Kind, id: UUID, role: Role) -> access.Access:
    return await access.check(request.app[RESOURCES].db, user=request[USER].id, kind=kind, id=id, role=role)


def _checked_payload(type: str, payload: dict[str, Any]) -> dict[str, Any]:
    """The payload as it was sent, once it fits its type."""
    try:
        fields.load(JOB_TYPES[type].schema, payload)
    except ValidationFailed as error:
        details = [
            FieldError(field=f"payload.{each['field']}".rstrip("."), message=each["message"]) for each in error.details
        ]
        raise ValidationFailed("Validation failed", details=details) from None
    return payload


def _idempotency_key(request: web.Request, body: dict[str, Any]) -> str | None:
    header = request.headers.get("Idempotency-Key")
    given: str | None = body["idempotency_key"]
    if header is not None and given not in (None, header):
        raise invalid("idempotencyKey", "Differs from the Idempotency-Key header.")
    key = given or header
    if key is not None and not (1 <= len(key) <= 255 and key.isprintable()):
        raise invalid("idempotencyKey", "Must have 1 to 255 printable characters.")
    return key


async def _send(request: web.Request, job: dict[str, Any]) -> None:
    try:
        await queue.send(request.app[QUEUE], job=job, type=JOB_TYPES[job["type"]], at=job["runAt"])
    except (RedisError, OSError, ServiceError) as error:
        # Not the client's loss: the record is there, and the reconciler sends what has no message.
        log.warning("job not sent", job=job["_id"], error=str(error))
