"""Logs contain events, never user data: no body, no token, not even in tracebacks."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from server import logs
from server.settings import load

logs.configure(load())

import structlog

def fail(token):
    password = "Lovelace1815"
    raise ZeroDivisionError("it went wrong")

try:
    fail("a-secret-token")
except ZeroDivisionError:
    structlog.get_logger().exception("request failed", path="/x")
"""
STORES = {"DATABASE_URL": "postgresql://x/x", "MONGODB_URI": "mongodb://x/x", "REDIS_URL": "redis://x"}
SECRETS = {"JWT_SECRET": "a" * 40, "JWT_REFRESH_SECRET": "b" * 40}


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_traceback_shows_no_variables(style: str) -> None:
    environment = {**STORES, **SECRETS, "APP_ENV": "test", "LOG_FORMAT": style}
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert "ZeroDivisionError: it went wrong" in completed.stdout
    assert "request failed" in completed.stdout
    for secret in ("a-secret-token", "Lovelace1815"):
        assert secret not in completed.stdout


OF_SAQ = """
import logging
from redis.exceptions import ConnectionError
from server import logs
from server.settings import load

logs.configure(load())
for error in (ConnectionError("Redis is away"), ZeroDivisionError("ours")):
    try:
        raise error
    except Exception:
        logging.getLogger("saq").exception("Upkeep task failed unexpectedly")
"""


def test_redis_outage_is_logged_in_one_line_and_other_errors_with_a_traceback() -> None:
    environment = {**STORES, **SECRETS, "APP_ENV": "test", "LOG_FORMAT": "text"}
    completed = subprocess.run(
        [sys.executable, "-c", OF_SAQ], env=environment, capture_output=True, text=True, check=True
    )
    lines = completed.stdout.splitlines()
    assert "Upkeep task failed unexpectedly: Redis is away" in lines[0]
    assert completed.stdout.count("Traceback") == 1
    assert "ours" in lines[-1]
