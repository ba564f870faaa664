"""Settings are validated once, at the start, and an error names the bad setting in one line."""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from server import settings
from server.settings import SettingsError

GOOD = {
    "DATABASE_URL": "postgresql://user:hidden-1@db/app",
    "MONGODB_URI": "mongodb://user:hidden-2@mongo/app",
    "REDIS_URL": "redis://:hidden-3@redis:6379/0",
    "JWT_SECRET": "hidden-4-access-secret-of-an-operator",
    "JWT_REFRESH_SECRET": "hidden-5-refresh-secret-of-an-operator",
}
PRODUCTION = GOOD | {"APP_ENV": "production", "CORS_ORIGIN": "https://app.example.org"}


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clear the environment, restored afterwards; the working directory has no .env file."""
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ, clear=True):
        yield


def load(**variables: str) -> settings.Settings:
    os.environ.update(variables)
    return settings.load()


def refusal(**variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(**variables)
    return str(caught.value)


def test_development_requires_the_store_addresses_only() -> None:
    loaded = load(**{name: GOOD[name] for name in ("DATABASE_URL", "MONGODB_URI", "REDIS_URL")})
    assert (loaded.app_env, loaded.port, loaded.bcrypt_rounds) == ("development", 3000, 12)
    assert (loaded.access_token_ttl, loaded.refresh_token_ttl) == (15 * 60, 7 * 24 * 3600)
    assert str(loaded.rate_limit_auth) == "10 per 15 minute"
    assert str(loaded.rate_limit_refresh) == "60 per 15 minute"
    assert str(loaded.rate_limit_account) == "10 per 15 minute"
    assert loaded.cors_origin == ("*",)
    assert loaded.job_fault_rate == 0.05
    assert loaded.log_format == "text"


def test_production_has_its_own_defaults() -> None:
    loaded = load(**PRODUCTION)
    assert loaded.production
    assert loaded.job_fault_rate == 0
    assert loaded.log_format == "json"


@pytest.mark.parametrize("name", ["DATABASE_URL", "MONGODB_URI", "REDIS_URL"])
def test_a_missing_setting_is_named(name: str) -> None:
    complaint = refusal(**{other: value for other, value in GOOD.items() if other != name})
    assert complaint == f'Environment variable "{name}" not set'


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("APP_ENV", "staging"),
        ("PORT", "http"),
        ("PORT", "70000"),
        ("DATABASE_URL", "mysql://db/app"),
        ("DATABASE_URL", "postgresql://db"),
        ("DATABASE_URL", "postgresql://db:port/app"),
        ("DATABASE_URL", "postgresql://[::1/app"),
        ("DATABASE_REPLICA_URLS", "postgresql://a/app,b/app"),
        ("MONGODB_URI", "mongodb://mongo"),
        ("MONGODB_URI", ""),
        ("MONGODB_URI", "mongodb://mongo:port/app"),
        ("REDIS_URL", "http://redis"),
        ("REDIS_URL", "redis://redis:port/0"),
        ("JWT_SECRET", "short"),
        ("JWT_SECRET", ""),
        ("JWT_REFRESH_SECRET", GOOD["JWT_SECRET"]),
        ("JWT_SECRET_PREVIOUS", "short"),
        ("JWT_REFRESH_SECRET_PREVIOUS", "short"),
        ("ACCESS_TOKEN_TTL", "soon"),
        ("REFRESH_TOKEN_TTL", "0s"),
        ("BCRYPT_ROUNDS", "3"),
        ("BCRYPT_ROUNDS", "32"),
        ("RATE_LIMIT_AUTH", "many"),
        ("RATE_LIMIT_REFRESH", "60/session"),
        ("RATE_LIMIT_ACCOUNT", "-1"),
        ("RATE_LIMIT_DEFAULT", "10/fortnight"),
        ("TRUSTED_PROXIES", "10.0.0.0/8,proxy"),
        ("CORS_ORIGIN", "app.example.org"),
        ("CORS_ORIGIN", "https://app.example.org/"),
        ("CORS_ORIGIN", "http://[::1"),
        ("HOST", ""),
        ("HOST", " "),
        ("RATE_LIMIT_AUTH", "0/minute"),
        ("RATE_LIMIT_AUTH", "10/0minutes"),
        ("RATE_LIMIT_AUTH", "10/minute;100/hour"),
        ("JWT_SECRET", "\udcff" * 32),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"),
        ("DATA_DIR", " "),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
        ("JOB_FAULT_RATE", "1.5"),
        ("WORKER_CONCURRENCY", "0"),
        ("JOBS_PER_USER", "-1"),
        ("WS_OUTBOX_FRAMES", "1"),
        ("HISTORY_EVENTS", "all"),
        ("DRAIN_SECONDS", "-1"),
        ("OPS_PASSWORD", "without a name"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_a_bad_setting_is_named_in_one_line(name: str, value: str) -> None:
    complaint = refusal(**GOOD | {name: value})
    assert f'"{name}"' in complaint
    assert "\n" not in complaint


WRONG = (
    "",
    " ",
    "x",
    "-1",
    "1.5",
    "9" * 30,
    "nan",
    "1,2",
    "a b",
    "http://",
    "http://[::1",
    "x://user:hun/ter2@db:1/app",
    "\udcff",
)


NOT_SECRET = ("CORS_ORIGIN", "TRUSTED_PROXIES")  # error messages show their values


@pytest.mark.parametrize("name", [*(name for name, _, _ in settings.documented_settings()), "REDIS_HOST", "REDIS_PORT"])
def test_error_of_a_bad_value_is_a_sentence_without_python(name: str) -> None:
    complaints = [str(error) for value in WRONG if (error := complaint_of(name, value)) is not None]
    for line in complaints:
        assert re.fullmatch(r'Environment variable "[A-Z_]+" (not set|invalid: [^\n]+)', line)
        assert not re.search(r"[\[{(]['\"]|None|Error|Traceback", line)
        assert "hun" not in line or name in NOT_SECRET


def complaint_of(name: str, value: str) -> SettingsError | None:
    os.environ.clear()
    parts = {"REDIS_HOST": "redis"} if name == "REDIS_PORT" else {}
    try:
        load(**{key: good for key, good in GOOD.items() if key != "REDIS_URL" or not parts} | parts | {name: value})
    except SettingsError as error:
        return error
    return None


def test_a_dotenv_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"PORT=\xff")
    assert refusal(**GOOD).startswith("The file .env cannot be read: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JWT_SECRET", ""),
        ("JWT_SECRET", "x" * 31),
        ("JWT_SECRET", "development-access-secret-change-me!"),
        ("JWT_REFRESH_SECRET", ""),
        ("JWT_REFRESH_SECRET", "development-refresh-secret-change-me"),
        ("BCRYPT_ROUNDS", "9"),
        ("CORS_ORIGIN", "*"),
        ("CORS_ORIGIN", "https://app.example.org, *"),
    ],
)
def test_production_rejects_unsafe_settings(name: str, value: str) -> None:
    assert f'"{name}"' in refusal(**PRODUCTION | {name: value})


@pytest.mark.parametrize("name", ["JWT_SECRET", "JWT_REFRESH_SECRET"])
def test_production_has_no_secret_of_its_own(name: str) -> None:
    without = {other: value for other, value in PRODUCTION.items() if other != name}
    assert refusal(**without) == f'Environment variable "{name}" not set'


def test_a_complaint_shows_no_secret() -> None:
    assert "hidden" not in refusal(**GOOD | {"JWT_SECRET": "hidden"})
    assert "hidden" not in refusal(**GOOD | {"DATABASE_URL": "mysql://user:hidden@db/app"})


def test_development_reads_a_dotenv_file_and_the_environment_wins(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=4000\nHOST=10.0.0.1\n")
    loaded = load(**GOOD, PORT="5000")
    assert (loaded.host, loaded.port) == ("10.0.0.1", 5000)


@pytest.mark.parametrize("app_env", ["test", "production"])
def test_only_development_reads_a_dotenv_file(app_env: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=4000\n")
    assert load(**PRODUCTION | {"APP_ENV": app_env}).port == 3000


def test_repr_of_the_settings_hides_the_secrets() -> None:
    text = repr(load(**GOOD, OPS_USERNAME="ops", OPS_PASSWORD="hidden-6"))
    assert "hidden" not in text
    assert "port=3000" in text
    assert "jwt_secret='***'" in text


def test_settings_do_not_change() -> None:
    loaded = load(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.port = 1  # type: ignore[misc]


def test_redis_may_be_given_in_parts() -> None:
    parts = {name: value for name, value in GOOD.items() if name != "REDIS_URL"}
    loaded = load(**parts, REDIS_HOST="cache", REDIS_PORT="7000", REDIS_PASSWORD="p@ss/word")
    assert loaded.redis_url == "redis://:p%40ss%2Fword@cache:7000/0"


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_redis_may_have_an_ipv6_address(host: str) -> None:
    parts = {name: value for name, value in GOOD.items() if name != "REDIS_URL"}
    assert load(**parts, REDIS_HOST=host).redis_url == "redis://[::1]:6379/0"


def test_redis_url_takes_precedence_over_its_parts() -> None:
    assert load(**GOOD, REDIS_HOST="cache").redis_url == GOOD["REDIS_URL"]


def test_store_urls_may_list_several_hosts() -> None:
    several = {"MONGODB_URI": "mongodb://a:27017,b:27018/app", "DATABASE_URL": "postgresql://a:5432,b:5433/app"}
    loaded = load(**GOOD | several)
    assert {"MONGODB_URI": loaded.mongodb_uri, "DATABASE_URL": loaded.database_url} == several


def test_a_bad_redis_port_is_named() -> None:
    parts = {name: value for name, value in GOOD.items() if name != "REDIS_URL"}
    assert '"REDIS_PORT"' in refusal(**parts, REDIS_HOST="cache", REDIS_PORT="0")


def test_lists_are_split_and_trimmed() -> None:
    loaded = load(
        **GOOD,
        CORS_ORIGIN=" https://a.example , https://b.example,",
        TRUSTED_PROXIES="10.0.0.0/8, ::1",
        DATABASE_REPLICA_URLS="postgresql://a/app, postgresql://b/app",
    )
    assert loaded.cors_origin == ("https://a.example", "https://b.example")
    assert [str(network) for network in loaded.trusted_proxies] == ["10.0.0.0/8", "::1/128"]
    assert loaded.database_replica_urls == ("postgresql://a/app", "postgresql://b/app")


@pytest.mark.parametrize("name", ["auth", "refresh", "account", "default"])
def test_a_rate_limit_can_be_off(name: str) -> None:
    loaded = load(**GOOD, **{f"RATE_LIMIT_{name.upper()}": "off"})
    assert getattr(loaded, f"rate_limit_{name}") is None


def test_dev_needs_no_store_and_listens_on_this_machine_only() -> None:
    assert settings.load_stack() == settings.StackSettings(data_dir=Path(".data"), host="127.0.0.1", port=3000)


@pytest.mark.parametrize(("name", "value"), [("PORT", "high"), ("HOST", "")])
def test_dev_rejects_a_bad_address(name: str, value: str) -> None:
    os.environ[name] = value
    with pytest.raises(SettingsError, match=f'"{name}"'):
        settings.load_stack()


def test_child_gets_the_environment_of_its_parent_with_the_changes() -> None:
    os.environ.update(KEPT="1", CHANGED="1")
    environment = settings.child_environment(CHANGED="2", NEW="3")
    assert (environment["KEPT"], environment["CHANGED"], environment["NEW"]) == ("1", "2", "3")
    assert os.environ["CHANGED"] == "1"


def test_every_setting_has_a_help_text() -> None:
    listed = {name: help for name, _, help in settings.documented_settings()}
    assert list(listed) == [field.name.upper() for field in dataclasses.fields(settings.Settings)]
    assert all(listed.values())
