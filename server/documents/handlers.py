"""Documents over REST."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import UUID

from aiohttp import hdrs, web
from aiohttp_apispec import docs, json_schema, querystring_schema, response_schema
from asyncpg import Record, UniqueViolationError

from server.deadline import paused
from server.documents import logs, paths, schemas, store, updates
from server.documents.news import Update
from server.documents.rooms import ROOMS
from server.errors import (
    Conflict,
    NotFound,
    PreconditionRequired,
    UnsupportedMediaType,
    ValidationFailed,
    invalid_field,
)
from server.json import NUL_MESSAGE
from server.postgres import Database
from server.projects.access import ACCESS, Role, requires
from server.realtime.hub import REALTIME
from server.rest import responses
from server.rest.etags import (
    Preconditions,
    conditional_write_error,
    etag,
    expected_revisions,
    is_not_modified,
    precondition_failed,
    preconditions,
)
from server.rest.keys import BODY, DB, ON_COMMIT, QUERY, RESOURCES, USER
from server.rest.marks import Idempotency, error_codes, idempotent
from server.rest.middlewares import read_body
from server.rest.pagination import PageQuery, decode_cursor, page_schema, paginate

routes = web.RouteTableDef()
CONTENT_BYTES = 10 << 20
LARGEST_VERSION = 1 << 53
DOCUMENT, VERSION, VERSION_WITH_CONTENT = schemas.Document(), schemas.Version(), schemas.VersionWithContent()


@routes.get("/api/v1/workspaces/{workspaceId}/documents")
@docs(tags=["documents"], summary="List the documents of a workspace, by path")
@querystring_schema(PageQuery)
@response_schema(page_schema(schemas.Document), 200)
@requires(Role.VIEWER)
async def list_documents(request: web.Request) -> web.Response:
    query = request[QUERY]
    (after,) = decode_cursor(query["cursor"], str, list_name="documents")
    workspace = UUID(request.match_info["workspaceId"])
    rows = await store.list_documents(_db(request), workspace=workspace, limit=query["limit"], after=after)
    return responses.page(DOCUMENT, *paginate(rows, query["limit"], "path", list_name="documents"))


@routes.post("/api/v1/workspaces/{workspaceId}/documents")
@docs(tags=["documents"], summary="Create a document")
@json_schema(schemas.NewDocument)
@response_schema(schemas.Document, 201)
@error_codes("path_taken")
@idempotent(Idempotency.BY_TRANSACTION)
@requires(Role.COLLABORATOR)
async def create_document(request: web.Request) -> web.Response:
    path, content = request[BODY]["path"], request[BODY]["content"]
    with _path_taken():
        made = await store.create_document(
            request[DB],
            project=request[ACCESS].project,
            workspace=UUID(request.match_info["workspaceId"]),
            actor=request[USER].id,
            path=path,
            mime_type=paths.mime_type_of(path),
            size=len(content.encode()),
            update=updates.first(content),
        )
    if made is None:
        raise NotFound("Workspace not found")
    request[ON_COMMIT].append(partial(_report, request, "DOCUMENT_CREATED", made, name=made["actor_name"]))
    tag = etag(made["revision"], request[ACCESS].role.name)
    return responses.created(f"/api/v1/documents/{made['id']}", DOCUMENT.dump(made), tag=tag)


@routes.get("/api/v1/documents/{documentId}")
@docs(tags=["documents"], summary="Read a document, without its text")
@response_schema(schemas.Document, 200)
@requires(Role.VIEWER)
async def read_document(request: web.Request) -> web.Response:
    return responses.entity(request, DOCUMENT, await _found(request), role=request[ACCESS].role.name)


@routes.patch("/api/v1/documents/{documentId}")
@docs(tags=["documents"], summary="Rename a document")
@json_schema(schemas.DocumentChange)
@response_schema(schemas.Document, 200)
@error_codes("path_taken")
@requires(Role.COLLABORATOR)
async def rename_document(request: web.Request) -> web.Response:
    role, path = request[ACCESS].role.name, request[BODY]["path"]
    revisions = expected_revisions(request, role)
    with _path_taken():
        made = await store.rename_document(
            _db(request),
            project=request[ACCESS].project,
            document=_id(request),
            actor=request[USER].id,
            path=path,
            mime_type=paths.mime_type_of(path),
            revisions=revisions,
        )
    if made is None:
        raise conditional_write_error(revisions)
    await _report(request, "DOCUMENT_RENAMED", made, name=made["actor_name"])
    return responses.entity(request, DOCUMENT, made, role=role)


@routes.delete("/api/v1/documents/{documentId}")
@docs(tags=["documents"], summary="Delete a document and its history")
@requires(Role.COLLABORATOR)
async def delete_document(request: web.Request) -> web.Response:
    revisions = expected_revisions(request, request[ACCESS].role.name)
    actor = request[USER].id
    gone = await store.delete_document(
        _db(request), project=request[ACCESS].project, document=_id(request), actor=actor, revisions=revisions
    )
    if gone is None:
        raise conditional_write_error(revisions)
    await _report(request, "DOCUMENT_DELETED", gone, name=gone["actor_name"])
    channels = request.app[REALTIME].channels
    await channels.deleted("document", [gone["id"]], actor=actor, name=gone["actor_name"])
    return responses.no_content()


@routes.get("/api/v1/documents/{documentId}/content")
@docs(
    tags=["documents"],
    summary="Read the text; its ETag is the version",
    produces=["text/plain"],
    responses={
        200: {"description": "the text"},
        304: {"description": "not modified: `If-None-Match` names its `ETag`"},
    },
)
@requires(Role.VIEWER)
async def read_content(request: web.Request) -> web.Response:
    row, rooms = await _found(request), request.app[ROOMS]
    tag = etag(row["version"])
    if is_not_modified(request, tag):
        return web.Response(status=304, headers={"ETag": f'"{tag}"'})
    text = rooms.text(row["id"], version=row["version"])
    if text is None:
        text, version = await logs.text_now(_db(request), rooms.workshop, row["id"])
        tag = etag(version)
    return web.Response(
        body=text.encode(), headers={"ETag": f'"{tag}"'}, content_type=row["mime_type"], charset="utf-8"
    )


@routes.put("/api/v1/documents/{documentId}/content")
@docs(
    tags=["documents"],
    summary="Replace the text; open editors receive the change as an edit",
    consumes=["text/plain"],
    parameters=[
        {"in": "body", "name": "content", "required": True, "schema": {"type": "string"}},
        {"in": "header", "name": "If-Match", "required": True, "type": "string", "description": "ETag, * to overwrite"},
    ],
)
@response_schema(schemas.Document, 200)
@error_codes("precondition_required", "precondition_failed", "too_large", "unsupported_media_type", "validation_failed")
@requires(Role.COLLABORATOR)
async def write_content(request: web.Request) -> web.Response:
    conditions = preconditions(request)
    if hdrs.IF_MATCH not in request.headers:
        raise PreconditionRequired('If-Match is required: the ETag of the text that you read, or "*" to overwrite')
    text = await _text(request)
    return await _rewritten(
        request, text=text, cause="put", accepts=_accepts(conditions, lambda version, _: [etag(version)])
    )


@routes.get("/api/v1/documents/{documentId}/versions")
@docs(tags=["documents"], summary="List the versions that can be restored, newest first")
@querystring_schema(PageQuery)
@response_schema(page_schema(schemas.Version), 200)
@requires(Role.VIEWER)
async def list_versions(request: web.Request) -> web.Response:
    query = request[QUERY]
    (before,) = decode_cursor(query["cursor"], int, list_name="versions")
    if before is not None and not 0 <= before <= LARGEST_VERSION:
        raise invalid_field("cursor", "Cursor does not belong to this list.")
    rows = await store.list_versions(_db(request), document=_id(request), limit=query["limit"], before=before)
    return responses.page(VERSION, *paginate(rows, query["limit"], "version", list_name="versions"))


@routes.get("/api/v1/documents/{documentId}/versions/{version}")
@docs(tags=["documents"], summary="Read a version and its text")
@response_schema(schemas.VersionWithContent, 200)
@requires(Role.VIEWER)
async def read_version(request: web.Request) -> web.Response:
    given = request.match_info["version"]
    if not given.isdecimal() or not given.isascii() or len(given) > 15:
        raise NotFound("Version not found")
    found = await _version(request, int(given), is_read=True)
    # All that ever changes of it is that its author deletes their account.
    tag = etag(found["version"], "" if found["created_by"] else "anonymous")
    return responses.with_etag(request, VERSION_WITH_CONTENT.dump(found), tag=tag)


@routes.post("/api/v1/documents/{documentId}/restore")
@docs(tags=["documents"], summary="Restore the text of an earlier version")
@json_schema(schemas.Restoration)
@response_schema(schemas.Document, 200)
@error_codes("precondition_failed")
@requires(Role.COLLABORATOR)
async def restore_version(request: web.Request) -> web.Response:
    role = request[ACCESS].role.name
    # The tag of the text, which it replaces, or that of the document, which it answers.
    accepts = _accepts(preconditions(request), lambda version, revision: [etag(version), etag(revision, role)])
    found = await _version(request, request[BODY]["version"], is_read=False)
    return await _rewritten(request, text=found["content"], cause="restore", accepts=accepts)


def _accepts(conditions: Preconditions, tags: Callable[[int, int], list[str]]) -> logs.Accepts | None:
    """The preconditions, for a version and a revision that have these tags; None without any."""
    if conditions.match is None and not conditions.none_match:
        return None
    return lambda version, revision: conditions.hold_for(*tags(version, revision))


async def _rewritten(request: web.Request, *, text: str, cause: str, accepts: logs.Accepts | None) -> web.Response:
    rooms, author, document = request.app[ROOMS], request[USER].id, _id(request)
    written = await logs.rewrite(
        _db(request), rooms.workshop, document, author=author, text=text, cause=cause, accepts=accepts
    )
    if written is None:
        raise precondition_failed()
    row = written.row
    rooms.accept(Update(document, row["version"], author, written.update))
    if written.log_is_long:
        rooms.compact_soon(document)
    if row["paused_version"] is not None:
        rooms.announce_version({**row, "document": document})
    await _report(request, "DOCUMENT_CHANGED", row, name=row["author_name"])
    return responses.with_etag(request, DOCUMENT.dump(row), tag=etag(row["version"]))


async def _version(request: web.Request, version: int, *, is_read: bool) -> dict[str, Any]:
    """A named version with its text; one that is only read does not change, and may be a replica's.

    Raises:
        NotFound: there is none.
    """
    stores, workshop = request.app[RESOURCES], request.app[ROOMS].workshop
    ask = partial(logs.read_version, document=_id(request), version=version)
    found, log = await (stores.replicas.read(ask) if is_read else ask(stores.db))
    with paused():
        return {**found, "content": found["content"] if log is None else await logs.text_of(log, workshop)}


async def _text(request: web.Request) -> str:
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise UnsupportedMediaType("Text must be UTF-8")
    raw = await read_body(request.clone(client_max_size=CONTENT_BYTES))
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise ValidationFailed("Text is not valid UTF-8") from None
    if "\0" in text:
        raise ValidationFailed(NUL_MESSAGE)
    return text


async def _found(request: web.Request) -> Record:
    row = await store.read_document(_db(request), document=_id(request))
    if row is None:
        raise NotFound("Document not found")
    return row


async def _report(request: web.Request, type: str, row: Record, *, name: str) -> None:
    await request.app[REALTIME].channels.announce_committed(
        type,
        workspaces=[row["workspace_id"]],
        user=request[USER].id,
        name=name,
        documentId=row["id"],
        path=row["path"],
        version=row["version"],
    )


@contextmanager
def _path_taken() -> Iterator[None]:
    try:
        yield
    except UniqueViolationError:
        taken = "Path is already a document, a folder of documents, or inside of a document"
        raise Conflict(taken, code="path_taken") from None


def _db(request: web.Request) -> Database:
    return request.app[RESOURCES].db


def _id(request: web.Request) -> UUID:
    return UUID(request.match_info["documentId"])
