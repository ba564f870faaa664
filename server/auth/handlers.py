"""REST handlers of accounts, sessions and tokens."""

import contextlib
from datetime import datetime
from typing import Any
from uuid import UUID

from aiohttp import web
from aiohttp_apispec import docs, json_schema, querystring_schema, response_schema
from asyncpg import Record

from server.auth import accounts, addresses, password_checks, schemas, sessions, store, tickets
from server.auth.accounts import Accept, wrong_password
from server.auth.password_checks import account_key
from server.auth.passwords import Fit, Hasher
from server.auth.sessions import Device, Issuer, Pair
from server.errors import NotFound, Unauthenticated, Unavailable
from server.fields import parse_id
from server.ratelimit import client_subnet, limit, session_key
from server.rest import answers, quotas
from server.rest.etags import expected_revisions, lost, untagged
from server.rest.keys import BODY, CLIENT, LIMITER, QUERY, RESOURCES, USER
from server.rest.marks import public, refuses
from server.rest.pages import PageQuery, keys_of, page, page_of

routes = web.RouteTableDef()
HASHER = web.AppKey("hasher", Hasher)
ISSUER = web.AppKey("issuer", Issuer)
ACCEPT: web.AppKey[Accept] = web.AppKey("accept")

USER_ANSWER, SESSION_ANSWER = schemas.User(), schemas.Session()


@routes.post("/api/v1/auth/register")
@docs(tags=["auth"], summary="Create an account")
@json_schema(schemas.Register)
@response_schema(schemas.SignedIn, 201)
@refuses("email_taken", "not_found", "gone", "forbidden")
@limit("auth")
@public
async def register(request: web.Request) -> web.Response:
    body = request[BODY]
    user, issued = await accounts.create(
        request.app[RESOURCES].db,
        request.app[ISSUER],
        email=body["email"],
        name=body["name"],
        password_hash=await request.app[HASHER].hash(body["password"]),
        device=_device(request),
        accept=request.app[ACCEPT],
        invitation_token=body["invitation_token"],
    )
    return answers.secret(answers.created("/api/v1/auth/profile", _signed_in(user, issued)))


@routes.post("/api/v1/auth/login")
@docs(tags=["auth"], summary="Sign in")
@json_schema(schemas.Login)
@response_schema(schemas.SignedIn, 200)
@refuses("invalid_credentials")
@limit("auth")
@public
async def login(request: web.Request) -> web.Response:
    db, body = request.app[RESOURCES].db, request[BODY]
    network, email_key = client_subnet(request[CLIENT]), addresses.key(body["email"])
    user = await store.user_by_email(db, email=body["email"], email_key=email_key, network=network)
    key = account_key(email_key, network=network if user and user["is_known_network"] else None)
    fit = await _check_password(request, body["password"], user, key=key)
    if user is None or not fit:
        raise wrong_password()
    issued = await sessions.start(
        db,
        request.app[ISSUER],
        user=user["id"],
        password_hash=user["password_hash"],
        device=_device(request),
    )
    if issued is None:
        raise wrong_password()
    if fit is Fit.OUTDATED:
        await _renew_hash(request, user)
    return answers.secret(answers.json(_signed_in(user, issued)))


@routes.post("/api/v1/auth/refresh")
@docs(tags=["auth"], summary="Exchange a refresh token, which is spent, for new tokens")
@json_schema(schemas.Refresh)
@response_schema(schemas.TokenPair, 200)
@refuses("unauthenticated", "refresh_reused")
@limit("refresh")
@public
async def refresh(request: web.Request) -> web.Response:
    db, issuer, token = request.app[RESOURCES].db, request.app[ISSUER], request[BODY]["refresh_token"]
    token_row = await sessions.find_token(db, issuer, token=token)
    if token_row is None:
        await quotas.count_address(request)
    else:
        await quotas.count(request, "refresh", session_key(token_row["session_id"]))
    issued = await sessions.refresh(db, issuer, token=token, found=token_row)
    return answers.secret(answers.json(_tokens(issued)))


@routes.post("/api/v1/auth/logout")
@docs(tags=["auth"], summary="Sign out: end this session and the session of the refresh token")
@json_schema(schemas.Logout)
async def logout(request: web.Request) -> web.Response:
    db, issuer = request.app[RESOURCES].db, request.app[ISSUER]
    await sessions.end_current(db, issuer, user=request[USER], refresh_token=request[BODY]["refresh_token"])
    return answers.nothing()


@routes.get("/api/v1/auth/profile")
@docs(tags=["auth"], summary="Read your profile")
@response_schema(schemas.User, 200)
async def read_profile(request: web.Request) -> web.Response:
    return answers.entity(request, USER_ANSWER, await _me(request))


@routes.patch("/api/v1/auth/profile")
@docs(tags=["auth"], summary="Change your name or avatar; null removes the avatar")
@json_schema(schemas.ProfileChange)
@response_schema(schemas.User, 200)
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
        raise lost(revisions)
    return answers.entity(request, USER_ANSWER, user)


@routes.delete("/api/v1/auth/profile")
@docs(tags=["auth"], summary="Delete your account and the projects that have no other member")
@json_schema(schemas.AccountDeletion)
@refuses("invalid_credentials", "conflict")
async def delete_profile(request: web.Request) -> web.Response:
    revisions = expected_revisions(request)
    me = await _verified(request, request[BODY]["password"])
    await accounts.delete(
        request.app[RESOURCES].db,
        request.app[ISSUER],
        user=request[USER],
        password_hash=me["password_hash"],
        revisions=revisions,
    )
    return answers.nothing()


@routes.post("/api/v1/auth/password")
@docs(tags=["auth"], summary="Change your password and end every other session")
@json_schema(schemas.PasswordChange)
@refuses("invalid_credentials")
@limit("auth")
async def change_password(request: web.Request) -> web.Response:
    me = await _verified(request, request[BODY]["current_password"])
    await accounts.change_password(
        request.app[RESOURCES].db,
        request.app[ISSUER],
        user=request[USER],
        old_hash=me["password_hash"],
        new_hash=await request.app[HASHER].hash(request[BODY]["new_password"]),
    )
    return answers.nothing()


@routes.get("/api/v1/auth/sessions")
@docs(tags=["auth"], summary="List the devices that you are signed in on, newest first")
@querystring_schema(PageQuery)
@response_schema(page_of(schemas.Session), 200)
async def list_sessions(request: web.Request) -> web.Response:
    user, query = request[USER], request[QUERY]
    rows = await store.list_sessions(
        request.app[RESOURCES].db,
        user=user.id,
        current=user.session,
        limit=query["limit"],
        after=keys_of(query["cursor"], datetime, UUID, of="sessions"),
    )
    return answers.page(SESSION_ANSWER, *page(rows, query["limit"], "created_at", "id", of="sessions"))


@routes.delete("/api/v1/auth/sessions/{sessionId}")
@docs(tags=["auth"], summary="Sign a device out")
@refuses("not_found")
async def end_session(request: web.Request) -> web.Response:
    untagged(request)
    session = parse_id(request.match_info["sessionId"])
    if session is None:
        raise NotFound("Session not found")
    db, issuer = request.app[RESOURCES].db, request.app[ISSUER]
    await sessions.end_one(db, issuer, user=request[USER].id, session=session)
    return answers.nothing()


@routes.delete("/api/v1/auth/sessions")
@docs(tags=["auth"], summary="Sign all other devices out")
async def end_other_sessions(request: web.Request) -> web.Response:
    untagged(request)
    await sessions.end_others(request.app[RESOURCES].db, request.app[ISSUER], user=request[USER])
    return answers.nothing()


@routes.post("/api/v1/auth/ws-ticket")
@docs(tags=["auth"], summary="Issue a ticket that opens one WebSocket: /ws?ticket=")
@response_schema(schemas.Ticket, 201)
async def issue_ticket(request: web.Request) -> web.Response:
    ticket = await tickets.issue(request.app[RESOURCES].redis, user=request[USER])
    return answers.secret(answers.json({"ticket": ticket, "expiresIn": tickets.TICKET_SECONDS}, status=201))


async def _me(request: web.Request) -> Record:
    user = await store.user_by_id(request.app[RESOURCES].db, user=request[USER].id)
    if user is None:
        raise Unauthenticated("The account has been deleted")
    return user


async def _verified(request: web.Request, password: str) -> Record:
    """Return the caller after checking their password again."""
    me = await _me(request)
    if not await _check_password(request, password, me, key=session_key(request[USER].session)):
        raise wrong_password()
    return me


async def _check_password(request: web.Request, password: str, user: Record | None, *, key: str) -> Fit:
    limiter, hasher = request.app[LIMITER], request.app[HASHER]
    return await password_checks.check(limiter, hasher, password, user and user["password_hash"], key=key)


async def _renew_hash(request: web.Request, user: Record) -> None:
    """Hash the password at today's cost: else this user's logins take another time than those of unknown addresses."""
    db = request.app[RESOURCES].db
    with contextlib.suppress(Unavailable):  # the user is signed in; the next login tries again
        new_hash = await request.app[HASHER].hash(request[BODY]["password"])
        await store.renew_hash(db, user=user["id"], old_hash=user["password_hash"], new_hash=new_hash)


def _device(request: web.Request) -> Device:
    return Device(user_agent=request.headers.get("User-Agent", ""), ip=request[CLIENT])


def _signed_in(user: Record, issued: Pair) -> dict[str, Any]:
    return {"user": USER_ANSWER.dump(user), **_tokens(issued)}


def _tokens(issued: Pair) -> dict[str, Any]:
    return {
        "accessToken": issued.access_token,
        "refreshToken": issued.refresh_token,
        "tokenType": "Bearer",
        "expiresIn": issued.expires_in,
    }
