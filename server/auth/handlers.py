"""REST handlers of accounts, sessions and tokens."""

import contextlib
from datetime import datetime
from typing import Any
from uuid import UUID

from aiohttp import web
from aiohttp_apispec import docs, json_schema, querystring_schema, response_schema
from asyncpg import Record

from server.auth import accounts, email_addresses, password_checks, schemas, sessions, store, tickets
from server.auth.accounts import AcceptInvitation, invalid_credentials
from server.auth.password_checks import account_key
from server.auth.passwords import Hasher, PasswordMatch
from server.auth.sessions import AuthContext, Device, IssuedTokens
from server.errors import NotFound, Unauthenticated, Unavailable
from server.fields import parse_id
from server.ratelimit import client_subnet, limit, session_key
from server.rest import quotas, responses
from server.rest.etags import check_preconditions_without_etag, conditional_write_error, expected_revisions
from server.rest.keys import BODY, CLIENT_ADDRESS, LIMITER, QUERY, RESOURCES, USER
from server.rest.marks import error_codes, public
from server.rest.pagination import PageQuery, decode_cursor, page_schema, paginate

routes = web.RouteTableDef()
HASHER = web.AppKey("hasher", Hasher)
AUTH_CONTEXT = web.AppKey("auth_context", AuthContext)
ACCEPT_INVITATION: web.AppKey[AcceptInvitation] = web.AppKey("accept_invitation")

USER_SCHEMA, SESSION_SCHEMA = schemas.UserSchema(), schemas.Session()


@routes.post("/api/v1/auth/register")
@docs(tags=["auth"], summary="Create an account")
@json_schema(schemas.Register)
@response_schema(schemas.SignedIn, 201)
@error_codes("email_taken", "not_found", "gone", "forbidden")
@limit("auth")
@public
async def register(request: web.Request) -> web.Response:
    body = request[BODY]
    user, issued = await accounts.create(
        request.app[RESOURCES].db,
        request.app[AUTH_CONTEXT],
        email=body["email"],
        name=body["name"],
        password_hash=await request.app[HASHER].hash(body["password"]),
        device=_device(request),
        accept_invitation=request.app[ACCEPT_INVITATION],
        invitation_token=body["invitation_token"],
    )
    return responses.no_store(responses.created("/api/v1/auth/profile", _signed_in(user, issued)))


@routes.post("/api/v1/auth/login")
@docs(tags=["auth"], summary="Sign in")
@json_schema(schemas.Login)
@response_schema(schemas.SignedIn, 200)
@error_codes("invalid_credentials")
@limit("auth")
@public
async def login(request: web.Request) -> web.Response:
    db, body = request.app[RESOURCES].db, request[BODY]
    network, email_key = client_subnet(request[CLIENT_ADDRESS]), email_addresses.key(body["email"])
    user = await store.user_by_email(db, email=body["email"], email_key=email_key, network=network)
    key = account_key(email_key, network=network if user and user["is_known_network"] else None)
    match = await _check_password(request, body["password"], user, key=key)
    if user is None or not match:
        raise invalid_credentials()
    issued = await sessions.start(
        db,
        request.app[AUTH_CONTEXT],
        user=user["id"],
        password_hash=user["password_hash"],
        device=_device(request),
    )
    if issued is None:
        raise invalid_credentials()
    if match is PasswordMatch.NEEDS_REHASH:
        await _rehash_password(request, user)
    return responses.no_store(responses.json(_signed_in(user, issued)))


@routes.post("/api/v1/auth/refresh")
@docs(tags=["auth"], summary="Exchange a refresh token, which is spent, for new tokens")
@json_schema(schemas.Refresh)
@response_schema(schemas.TokenPair, 200)
@error_codes("unauthenticated", "refresh_reused")
@limit("refresh")
@public
async def refresh(request: web.Request) -> web.Response:
    db, auth_context, token = request.app[RESOURCES].db, request.app[AUTH_CONTEXT], request[BODY]["refresh_token"]
    token_row = await sessions.find_refresh_token(db, auth_context, token=token)
    if token_row is None:
        await quotas.consume_auth_for_address(request)
    else:
        await quotas.consume(request, "refresh", session_key(token_row["session_id"]))
    issued = await sessions.refresh(db, auth_context, token=token, found=token_row)
    return responses.no_store(responses.json(_tokens(issued)))


@routes.post("/api/v1/auth/logout")
@docs(tags=["auth"], summary="Sign out: end this session and the session of the refresh token")
@json_schema(schemas.Logout)
async def logout(request: web.Request) -> web.Response:
    db, auth_context = request.app[RESOURCES].db, request.app[AUTH_CONTEXT]
    await sessions.end_current(db, auth_context, user=request[USER], refresh_token=request[BODY]["refresh_token"])
    return responses.no_content()


@routes.get("/api/v1/auth/profile")
@docs(tags=["auth"], summary="Read your profile")
@response_schema(schemas.UserSchema, 200)
async def read_profile(request: web.Request) -> web.Response:
    return responses.entity(request, USER_SCHEMA, await _me(request))


@routes.patch("/api/v1/auth/profile")
@docs(tags=["auth"], summary="Change your name or avatar; null removes the avatar")
@json_schema(schemas.ProfileChange)
@response_schema(schemas.UserSchema, 200)
async def change_profile(request: web.Request) -> web.Response:
    changes, revisions = request[BODY], expected_revisions(request)
    user = await store.change_user(
        request.app[RESOURCES].db,
        user=request[USER].id,
        name=changes.get("name"),
        avatar_url=changes.get("avatar_url"),
        set_avatar="avatar_url" in changes,
        revisions=revisions,
    )
    if user is None:
        raise conditional_write_error(revisions)
    return responses.entity(request, USER_SCHEMA, user)


@routes.delete("/api/v1/auth/profile")
@docs(tags=["auth"], summary="Delete your account and the projects that have no other member")
@json_schema(schemas.AccountDeletion)
@error_codes("invalid_credentials", "conflict")
async def delete_profile(request: web.Request) -> web.Response:
    revisions = expected_revisions(request)
    me = await _reauthenticate(request, request[BODY]["password"])
    await accounts.delete(
        request.app[RESOURCES].db,
        request.app[AUTH_CONTEXT],
        user=request[USER],
        password_hash=me["password_hash"],
        revisions=revisions,
    )
    return responses.no_content()


@routes.post("/api/v1/auth/password")
@docs(tags=["auth"], summary="Change your password and end every other session")
@json_schema(schemas.PasswordChange)
@error_codes("invalid_credentials")
@limit("auth")
async def change_password(request: web.Request) -> web.Response:
    me = await _reauthenticate(request, request[BODY]["current_password"])
    await accounts.change_password(
        request.app[RESOURCES].db,
        request.app[AUTH_CONTEXT],
        user=request[USER],
        old_hash=me["password_hash"],
        new_hash=await request.app[HASHER].hash(request[BODY]["new_password"]),
    )
    return responses.no_content()


@routes.get("/api/v1/auth/sessions")
@docs(tags=["auth"], summary="List the devices that you are signed in on, newest first")
@querystring_schema(PageQuery)
@response_schema(page_schema(schemas.Session), 200)
async def list_sessions(request: web.Request) -> web.Response:
    user, query = request[USER], request[QUERY]
    rows = await store.list_sessions(
        request.app[RESOURCES].db,
        user=user.id,
        current=user.session,
        limit=query["limit"],
        after=decode_cursor(query["cursor"], datetime, UUID, list_name="sessions"),
    )
    return responses.page(SESSION_SCHEMA, *paginate(rows, query["limit"], "created_at", "id", list_name="sessions"))


@routes.delete("/api/v1/auth/sessions/{sessionId}")
@docs(tags=["auth"], summary="Sign a device out")
@error_codes("not_found")
async def end_session(request: web.Request) -> web.Response:
    check_preconditions_without_etag(request)
    session = parse_id(request.match_info["sessionId"])
    if session is None:
        raise NotFound("Session not found")
    db, auth_context = request.app[RESOURCES].db, request.app[AUTH_CONTEXT]
    await sessions.end_one(db, auth_context, user=request[USER].id, session=session)
    return responses.no_content()


@routes.delete("/api/v1/auth/sessions")
@docs(tags=["auth"], summary="Sign all other devices out")
async def end_other_sessions(request: web.Request) -> web.Response:
    check_preconditions_without_etag(request)
    await sessions.end_others(request.app[RESOURCES].db, request.app[AUTH_CONTEXT], user=request[USER])
    return responses.no_content()


@routes.post("/api/v1/auth/ws-ticket")
@docs(tags=["auth"], summary="Issue a ticket that opens one WebSocket: /ws?ticket=")
@response_schema(schemas.Ticket, 201)
async def issue_ticket(request: web.Request) -> web.Response:
    ticket = await tickets.issue(request.app[RESOURCES].redis, user=request[USER])
    return responses.no_store(responses.json({"ticket": ticket, "expiresIn": tickets.TICKET_TTL_SECONDS}, status=201))


async def _me(request: web.Request) -> Record:
    user = await store.user_by_id(request.app[RESOURCES].db, user=request[USER].id)
    if user is None:
        raise Unauthenticated("The account has been deleted")
    return user


async def _reauthenticate(request: web.Request, password: str) -> Record:
    """Return the caller after checking their password again."""
    me = await _me(request)
    if not await _check_password(request, password, me, key=session_key(request[USER].session)):
        raise invalid_credentials()
    return me


async def _check_password(request: web.Request, password: str, user: Record | None, *, key: str) -> PasswordMatch:
    limiter, hasher = request.app[LIMITER], request.app[HASHER]
    return await password_checks.check(limiter, hasher, password, user and user["password_hash"], key=key)


async def _rehash_password(request: web.Request, user: Record) -> None:
    """Hash the password at the current cost: else timing would tell this user's address from an unknown one."""
    db = request.app[RESOURCES].db
    with contextlib.suppress(Unavailable):  # the user is signed in; the next login tries again
        new_hash = await request.app[HASHER].hash(request[BODY]["password"])
        await store.replace_password_hash(db, user=user["id"], old_hash=user["password_hash"], new_hash=new_hash)


def _device(request: web.Request) -> Device:
    return Device(user_agent=request.headers.get("User-Agent", ""), ip=request[CLIENT_ADDRESS])


def _signed_in(user: Record, issued: IssuedTokens) -> dict[str, Any]:
    return {"user": USER_SCHEMA.dump(user), **_tokens(issued)}


def _tokens(issued: IssuedTokens) -> dict[str, Any]:
    return {
        "accessToken": issued.access_token,
        "refreshToken": issued.refresh_token,
        "tokenType": "Bearer",
        "expiresIn": issued.expires_in,
    }
