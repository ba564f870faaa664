"""Accounts over REST."""

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
    user, pair = await accounts.create(
        request.app[RESOURCES].db,
        request.app[ISSUER],
        email=body["email"],
        name=body["name"],
        password_hash=await request.app[HASHER].hash(body["password"]),
        device=_device(request),
        accept=request.app[ACCEPT],
        invitation_token=body["invitation_token"],
    )
    return answers.secret(answers.created("/api/v1/auth/profile", _signed_in(user, pair)))


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
    pair = await sessions.start(
        db,
        request.app[ISSUER],
        user=user["id"],
        password_hash=user["password_hash"],
        device=_device(request),
    )
    if pair is None:
        raise wrong_password()
    if fit is Fit.OUTDATED:
        await _renew_hash(request, user)
    return answers.secret(answers.json(_signed_in(user, pair)))


@routes.post("/api/v1/auth/refresh")
@docs(tags=["auth"], summary="Exchange a refresh token for a new pair; it is spent by that")
@json_schema(schemas.Refresh)
@response_schema(schemas.TokenPair, 200)
@refuses("unauthenticated", "refresh_reused")
@limit("refresh")
@public
async def refresh(request: web.Request) -> web.Response:
    db, issuer, token = request.app[RESOURCES].db, request.app[ISSUER], request[BODY]["refresh_token"]
    found = await sessions.find_token(db, issuer, token=token)
    if found is None:
        await quotas.count_address(request)
    else:
        await quotas.count(request, "refresh", session_key(found["session_id"]))
    pair = await sessions.refresh(db, issuer, token=token, found=found)
    return answers.secret(answers.json(_tokens(pair)))


@routes.post("/api/v1/auth/logout")
@docs(tags=["auth"], summary="End this session, and that of the refresh token where it is another of yours")
@json_schema(schemas.Logout)
async def logout(request: web.Request) -> web.Response:
    db, issuer = request.app[RESOURCES].db, request.app[ISSUER]
    await sessions.end_current(db, issuer, user=request[USER], refresh_token=request[BODY]["refresh_token"])
    return answers.nothing()


@routes.get("/api/v1/auth/profile")
@docs(tags=["auth"], summary="Who am I")
@response_schema(schemas.User, 200)
async def read_profile(request: web.Request) -> web.Response:
    return answers.entity(request, USER_ANSWER, await _me(request))


@routes.patch("/api/v1/auth/profile")
@docs(tags=["auth"], summary="Change your name or avatar; null removes the avatar")
@json_schema(schemas.ProfileChange)
@response_schema(schemas.User, 200)
async def change_profile(request: web.Request) -> web.Response:
    given, revisions = request[BODY], expected_revisions(request)
    user = await store.change_user(
        request.app[RESOURCES].db,
        user=request[USER].id,
        name=given.get("name"),
        avatar_url=given.get("avatar_url"),
        set_avatar="avatar_url" in given,
        revisions=revisions,
    )
    if user is None:
        raise lost(revisions)
    return answers.entity(request, USER_ANSWER, user)


@routes.delete("/api/v1/auth/profile")
@docs(tags=["auth"], summary="Delete your account, with the projects that nobody else is in")
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
@docs(tags=["auth"], summary="Change your password; every other session ends")
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
@docs(tags=["auth"], summary="The devices that you are signed in on, newest first")
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
        raise NotFound("No such session")
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
@docs(tags=["auth"], summary="A ticket that opens one WebSocket: /ws?ticket=")
@response_schema(schemas.Ticket, 201)
async def issue_ticket(request: web.Request) -> web.Response:
    ticket = await tickets.issue(request.app[RESOURCES].redis, user=request[USER])
    return answers.secret(answers.json({"ticket": ticket, "expiresIn": tickets.TICKET_SECONDS}, status=201))


async def _me(request: web.Request) -> Record:
    user = await store.user_by_id(request.app[RESOURCES].db, user=request[USER].id)
    if user is None:
        raise Unauthenticated("The account is gone")
    return user


async def _verified(request: web.Request, password: str) -> Record:
    """Who asks, once more by their password."""
    me = await _me(request)
    if not await _check_password(request, password, me, key=session_key(request[USER].session)):
        raise wrong_password()
    return me


async def _check_password(request: web.Request, password: str, user: Record | None, *, key: str) -> Fit:
    limiter, hasher = request.app[LIMITER], request.app[HASHER]
    return await password_checks.check(limiter, hasher, password, user and user["password_hash"], key=key)


async def _renew_hash(request: web.Request, user: Record) -> None:
    """Hash the password as today: else this user's logins would take another time than those of unknown addresses."""
    db = request.app[RESOURCES].db
    with contextlib.suppress(Unavailable):  # they are signed in; their next login renews it as well
        renewed = await request.app[HASHER].hash(request[BODY]["password"])
        await store.renew_hash(db, user=user["id"], old_hash=user["password_hash"], new_hash=renewed)


def _device(request: web.Request) -> Device:
    return Device(user_agent=request.headers.get("User-Agent", ""), ip=request[CLIENT])


def _signed_in(user: Record, pair: Pair) -> dict[str, Any]:
    return {"user": USER_ANSWER.dump(user), **_tokens(pair)}


def _tokens(pair: Pair) -> dict[str, Any]:
    return {
        "accessToken": pair.access_token,
        "refreshToken": pair.refresh_token,
        "tokenType": "Bearer",
        "expiresIn": pair.expires_in,
    }
