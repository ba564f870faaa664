"""Accounts over REST."""

from typing import Any

from aiohttp import web
from aiohttp_apispec import docs, json_schema, response_schema
from asyncpg import Record

from server.auth import schemas, sessions, store
from server.auth.passwords import Hasher
from server.auth.sessions import Issuer, Pair
from server.errors import Conflict, Unauthenticated
from server.postgres import Executor
from server.ratelimit import limit
from server.rest import answers
from server.rest.keys import BODY, CLIENT, RESOURCES, USER
from server.rest.marks import public, refuses

routes = web.RouteTableDef()
HASHER = web.AppKey("hasher", Hasher)
ISSUER = web.AppKey("issuer", Issuer)

USER_ANSWER, SESSION_ANSWER = schemas.User(), schemas.Session()


@routes.post("/api/v1/auth/register")
@docs(tags=["auth"], summary="Create an account")
@json_schema(schemas.Register)
@response_schema(schemas.SignedIn, 201)
@refuses("email_taken")
@limit("auth")
@public
async def register(request: web.Request) -> web.Response:
    body = request[BODY]
    hashed = await request.app[HASHER].hash(body["password"])
    async with request.app[RESOURCES].db.transaction() as db:
        user = await store.create_user(db, email=body["email"], name=body["name"], password_hash=hashed)
        if user is None:
            raise Conflict("Email already registered", code="email_taken")
        pair = await _start_session(request, db, user)
    return answers.created("/api/v1/auth/profile", _signed_in(user, pair))


@routes.post("/api/v1/auth/login")
@docs(tags=["auth"], summary="Sign in")
@json_schema(schemas.Login)
@response_schema(schemas.SignedIn, 200)
@refuses("invalid_credentials")
@limit("auth")
@public
async def login(request: web.Request) -> web.Response:
    db, body = request.app[RESOURCES].db, request[BODY]
    user = await store.user_by_email(db, email=body["email"])
    fits = await request.app[HASHER].verify(body["password"], user and user["password_hash"])
    if user is None or not fits:
        raise Unauthenticated("Email or password is wrong", code="invalid_credentials")
    return answers.json(_signed_in(user, await _start_session(request, db, user)))


@routes.get("/api/v1/auth/profile")
@docs(tags=["auth"], summary="Who am I")
@response_schema(schemas.User, 200)
async def read_profile(request: web.Request) -> web.Response:
    return answers.entity(request, USER_ANSWER, await _me(request))


async def _me(request: web.Request) -> Record:
    user = await store.user_by_id(request.app[RESOURCES].db, user=request[USER].id)
    if user is None:
        raise Unauthenticated("The account is gone")
    return user


async def _start_session(request: web.Request, db: Executor, user: Record) -> Pair:
    return await sessions.start(
        db,
        request.app[ISSUER],
        user=user["id"],
        user_agent=request.headers.get("User-Agent", ""),
        ip=request[CLIENT],
    )


def _signed_in(user: Record, pair: Pair) -> dict[str, Any]:
    return {"user": USER_ANSWER.dump(user), **_tokens(pair)}


def _tokens(pair: Pair) -> dict[str, Any]:
    return {
        "accessToken": pair.access_token,
        "refreshToken": pair.refresh_token,
        "tokenType": "Bearer",
        "expiresIn": pair.expires_in,
    }
