"""Settings: read from the environment and validated once, then frozen.

No other module reads the environment. Every field has its help text and its default, so that a test can compare the
table in docs/reference.md and ``.env.example`` with the code. The variable is the name of the field in upper case.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import limits
from environs import Env, EnvError, EnvValidationError, validate

DEVELOPMENT, TEST, PRODUCTION = "development", "test", "production"
MIN_SECRET_BYTES = 32
MIN_PRODUCTION_BCRYPT_ROUNDS = 10
Network = IPv4Network | IPv6Network


class StartError(Exception):
    """A process cannot start or continue; the text is one line for the operator."""


class SettingsError(StartError):
    """A setting is missing or invalid; the text is one line that names it."""


def invalid_setting(name: str, why: str) -> SettingsError:
    """Return the error for an invalid value; ``why`` is a sentence without secrets."""
    return SettingsError(f'Environment variable "{name}" invalid: {why}')


@dataclass(frozen=True)
class PerEnvironment:
    """A default that differs in development."""

    development: Any
    otherwise: Any

    def choose(self, app_env: str) -> Any:
        return self.development if app_env == DEVELOPMENT else self.otherwise


Parser = Callable[[Env, str, Any], Any]


def setting(parse: Parser, *, default: Any = MISSING, help: str, secret: bool = False) -> Any:
    """Return a field of Settings; without a default the variable is required."""
    return field(metadata={"parse": parse, "default": default, "help": help, "secret": secret})


def text(env: Env, name: str, default: Any) -> str:
    return str(env.str(name, default)).strip()


def host(env: Env, name: str, default: Any) -> str:
    """Return an address or host name to listen on. An empty one is rejected: it would mean all addresses."""
    if not (address := text(env, name, default)):
        raise invalid_setting(name, "Must be an address, such as 127.0.0.1 or ::1.")
    return address


def directory(env: Env, name: str, default: Any) -> Path:
    if not text(env, name, str(default)):
        raise invalid_setting(name, "Must name a directory.")
    return Path(env.path(name, default))


def one_of(*choices: str) -> Parser:
    return lambda env, name, default: env.str(name, default, validate=validate.OneOf(choices))


def integer(low: int, high: int) -> Parser:
    return lambda env, name, default: env.int(name, default, validate=validate.Range(low, high))


def fraction(env: Env, name: str, default: Any) -> float:
    return float(env.float(name, default, validate=validate.Range(0, 1)))


def seconds(env: Env, name: str, default: Any) -> int:
    """Return a duration such as ``15m`` or ``7d`` (GEP-2257), in whole seconds."""
    parsed = env.timedelta(name, default)
    if parsed.total_seconds() < 1:
        raise invalid_setting(name, "Must be at least 1s.")
    return int(parsed.total_seconds())


def comma_separated(env: Env, name: str, default: Any) -> tuple[str, ...]:
    return tuple(part.strip() for part in env.str(name, default).split(",") if part.strip())


def origins(env: Env, name: str, default: Any) -> tuple[str, ...]:
    """Return origins as browsers send them: ``scheme://host[:port]``, or ``*``."""
    values = comma_separated(env, name, default)
    for origin in values:
        if origin != "*" and not _is_origin(origin):
            raise invalid_setting(name, f"{origin} is not an origin such as https://app.example.org")
    return values


def _is_origin(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return bool(parts.netloc) and text == f"{parts.scheme}://{parts.netloc}"


def networks(env: Env, name: str, default: Any) -> tuple[Network, ...]:
    try:
        return tuple(ip_network(part) for part in comma_separated(env, name, default))
    except ValueError as error:
        raise invalid_setting(name, f"{error}.") from error


def rate(env: Env, name: str, default: Any) -> limits.RateLimitItem | None:
    """Return a rate in the notation of the limits library, such as ``10/15minutes``; None for ``off``."""
    value = env.str(name, default).strip()
    if value == "off":
        return None
    try:
        [item] = limits.parse_many(value)
    except ValueError:
        raise invalid_setting(name, "Must be one rate such as 10/15minutes, or off.") from None
    if item.amount < 1 or _ZERO_PERIOD.search(value):  # the library parses 0minutes as 1minute
        raise invalid_setting(name, "Must allow at least 1 request in at least 1 second; off for no limit.")
    return item


_ZERO_PERIOD = re.compile(r"[/ ]0+\s*[a-z]", re.IGNORECASE)


def url(*schemes: str, database: bool = False) -> Parser:
    """Return a parser for a URL with one of these schemes; with ``database`` its path must name a database."""

    def parse(env: Env, name: str, default: Any) -> str:
        return check_url(name, text(env, name, default), schemes, database=database)

    return parse


def urls(*schemes: str) -> Parser:
    def parse(env: Env, name: str, default: Any) -> tuple[str, ...]:
        return tuple(check_url(name, value, schemes, database=True) for value in comma_separated(env, name, default))

    return parse


def optional(parse: Parser) -> Parser:
    """Return a parser that also accepts the empty value."""
    return lambda env, name, default: parse(env, name, default) if text(env, name, default) else ""


def check_url(name: str, value: str, schemes: tuple[str, ...], *, database: bool) -> str:
    try:
        parts = urlsplit(value)
        if "," not in parts.netloc:  # PostgreSQL and MongoDB allow several hosts: their clients check these
            parts.port  # noqa: B018 - raises if it is not a port
    except ValueError:  # its text contains part of the value, maybe of a password
        raise invalid_setting(
            name, "Must have a port up to 65535, IPv6 in brackets, and / : @ of a password as %2F %3A %40."
        ) from None
    if parts.scheme not in schemes:
        raise invalid_setting(name, f"Must begin with {schemes[0]}://")
    if parts.scheme in ("http", "https") and not parts.hostname:
        raise invalid_setting(name, "Must name a host.")
    if database and not parts.path.strip("/"):
        raise invalid_setting(name, "Must name a database in its path.")
    return value


def authority(host: str, port: int) -> str:
    """Return ``host:port`` as a URL has it: an IPv6 address in brackets (RFC 3986)."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def redis_url(env: Env, name: str, default: Any) -> str:
    """Return REDIS_URL, else a URL made of REDIS_HOST, REDIS_PORT and REDIS_PASSWORD."""
    if env.str(name, None) is not None or not text(env, "REDIS_HOST", ""):
        return str(url("redis", "rediss", "unix")(env, name, default))
    address = authority(text(env, "REDIS_HOST", ""), integer(1, 65535)(env, "REDIS_PORT", 6379))
    password = env.str("REDIS_PASSWORD", "")
    credentials = f":{quote(password, safe='')}@" if password else ""
    return check_url("REDIS_HOST", f"redis://{credentials}{address}/0", ("redis",), database=False)


POSTGRES = ("postgresql", "postgres")


@dataclass(frozen=True, repr=False)
class Settings:
    """The complete configuration of a server or worker process; it never changes."""

    app_env: str = setting(
        one_of(DEVELOPMENT, TEST, PRODUCTION),
        default=DEVELOPMENT,
        help="`development`, `test` or `production`; production rejects unsafe settings",
    )
    host: str = setting(host, default="0.0.0.0", help="address to listen on (`127.0.0.1` in `run.py dev`)")  # noqa: S104
    port: int = setting(integer(0, 65535), default=3000, help="port to listen on; 0 picks a free one")
    database_url: str = setting(
        url(*POSTGRES, database=True),
        help="PostgreSQL 15+: `postgresql://user:password@host/db`",
        secret=True,
    )
    database_replica_urls: tuple[str, ...] = setting(
        urls(*POSTGRES), default="", help="comma-separated list of replicas, for reads that may lag", secret=True
    )
    mongodb_uri: str = setting(
        url("mongodb", "mongodb+srv", database=True), help="MongoDB 7+; the path names the database", secret=True
    )
    redis_url: str = setting(
        redis_url,
        help="Redis 7+ or Valkey 8+; or `REDIS_HOST`, `REDIS_PORT` and `REDIS_PASSWORD` instead",
        secret=True,
    )
    jwt_secret: str = setting(
        text,
        default=PerEnvironment("development-access-secret-change-me!", ""),
        help="key that signs access tokens; at least 32 bytes",
        secret=True,
    )
    jwt_secret_previous: str = setting(
        text, default="", help="previous key, accepted for access tokens during a rotation", secret=True
    )
    jwt_refresh_secret: str = setting(
        text,
        default=PerEnvironment("development-refresh-secret-change-me", ""),
        help="key of refresh tokens, their hashes and successors; must differ from `JWT_SECRET`",
        secret=True,
    )
    jwt_refresh_secret_previous: str = setting(
        text, default="", help="previous key, accepted for refresh tokens during a rotation", secret=True
    )
    access_token_ttl: int = setting(seconds, default=timedelta(minutes=15), help="lifetime of an access token")
    refresh_token_ttl: int = setting(seconds, default=timedelta(days=7), help="lifetime of a refresh token")
    bcrypt_rounds: int = setting(integer(4, 31), default=12, help="bcrypt cost, 4–31; at least 10 in production")
    rate_limit_auth: limits.RateLimitItem | None = setting(
        rate,
        default="10/15minutes",
        help="rate limit of register, login and password requests, per address; `off` for none",
    )
    rate_limit_refresh: limits.RateLimitItem | None = setting(
        rate, default="60/15minutes", help="rate limit of token refreshes, per session; `off` for none"
    )
    rate_limit_account: limits.RateLimitItem | None = setting(
        rate,
        default="10/15minutes",
        help="rate limit of failed password checks, per account or session; `off` for none",
    )
    rate_limit_default: limits.RateLimitItem | None = setting(
        rate,
        default="100/15minutes",
        help="rate limit of all other `/api` requests, per user or address; `off` for none",
    )
    trusted_proxies: tuple[Network, ...] = setting(
        networks, default="", help="comma-separated list of addresses whose `X-Forwarded-For` is trusted"
    )
    cors_origin: tuple[str, ...] = setting(
        origins,
        default=PerEnvironment("*", ""),
        help="comma-separated list of origins; `*` only outside production",
    )
    job_fault_rate: float = setting(
        fraction, default=PerEnvironment(0.05, 0), help="fraction of job attempts that fail on purpose"
    )
    worker_concurrency: int = setting(integer(1, 1000), default=10, help="jobs that one worker runs at once")
    jobs_per_user: int = setting(
        integer(1, 1000), default=4, help="attempts of one user queued or running, over all workers"
    )
    ws_frames_per_second: int = setting(
        integer(1, 100_000), default=100, help="frames that a socket may send per second"
    )
    ws_burst: int = setting(integer(1, 100_000), default=200, help="frames that a socket may send in a burst")
    ws_max_message_bytes: int = setting(
        integer(1024, 64 << 20), default=256 << 10, help="maximum frame size of a JSON client, in bytes"
    )
    ws_outbox_frames: int = setting(
        integer(8, 1_000_000), default=256, help="maximum number of frames queued for a slow socket"
    )
    ws_outbox_bytes: int = setting(
        integer(64 << 10, 1 << 30), default=4 << 20, help="maximum number of bytes queued for a slow socket"
    )
    history_events: int = setting(
        integer(10, 100_000), default=1000, help="maximum number of events kept of each workspace, for 24 h"
    )
    history_bytes: int = setting(
        integer(1 << 20, 1 << 30), default=16 << 20, help="maximum number of bytes of events kept of each workspace"
    )
    drain_seconds: int = setting(
        integer(0, 3600), default=10, help="seconds in which a stopping server drains its sockets"
    )
    ops_username: str = setting(
        text, default="", help="user name for `/metrics` and `/ops/queues` (Basic authentication)"
    )
    ops_password: str = setting(
        text, default="", help="its password; if unset, both respond with 404 in production", secret=True
    )
    metrics_port: int = setting(
        integer(0, 65535), default=0, help="port of a worker's own `/health` and `/metrics`; 0 for none"
    )
    otel_exporter_otlp_endpoint: str = setting(
        optional(url("http", "https")),
        default="",
        help="URL of a collector of OpenTelemetry traces, OTLP over HTTP; needs the extra `otel`",
    )
    log_level: str = setting(
        one_of("debug", "info", "warning", "error"),
        default="info",
        help="`debug`, `info`, `warning` or `error`",
    )
    log_format: str = setting(one_of("text", "json"), default=PerEnvironment("text", "json"), help="`text` or `json`")
    data_dir: Path = setting(
        directory,
        default=Path(".data"),
        help="data directory of `run.py dev`",
    )

    def __repr__(self) -> str:
        values = (
            f"{setting.name}={'***' if setting.metadata['secret'] else getattr(self, setting.name)!r}"
            for setting in fields(self)
        )
        return f"Settings({', '.join(values)})"

    @property
    def production(self) -> bool:
        return self.app_env == PRODUCTION


def load() -> Settings:
    """Read and validate all settings.

    Raises:
        SettingsError: a setting is missing or invalid.
    """
    env = _environment()
    app_env = _value(_field("app_env"), env, DEVELOPMENT)
    settings = Settings(**{setting.name: _value(setting, env, app_env) for setting in fields(Settings)})
    for problem in _problems(settings):
        raise SettingsError(problem)
    return settings


@dataclass(frozen=True)
class StackSettings:
    """The settings of ``run.py dev``, which has its own stores and secrets."""

    data_dir: Path
    host: str
    port: int


def load_stack() -> StackSettings:
    """Read the settings that do not depend on the stores' addresses.

    Raises:
        SettingsError: a setting is invalid.
    """
    env = _environment()
    return StackSettings(
        data_dir=_value(_field("data_dir"), env, DEVELOPMENT),
        host=_parsed(host, env, "HOST", "127.0.0.1"),
        port=_value(_field("port"), env, DEVELOPMENT),
    )


def child_environment(**changes: str) -> dict[str, str]:
    """Return the environment for a child process: that of this process, with these changes."""
    return {**os.environ, **changes}


def multiproc_dir() -> str | None:
    """Return the metrics directory that a supervisor has set (prometheus_client's own variable), or None."""
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR")


def documented_settings() -> Iterator[tuple[str, str, str]]:
    """Yield name, formatted default and help of each variable, for docs/reference.md and ``.env.example``."""
    for setting in fields(Settings):
        yield setting.name.upper(), _format_default(setting), setting.metadata["help"]


def _format_default(setting: Field[Any]) -> str:
    match setting.metadata["default"]:
        case default if default is MISSING:
            return "required"
        case PerEnvironment() if setting.metadata["secret"]:
            return "required outside development"
        case PerEnvironment(development, otherwise):
            return f"`{development}` in development, else {f'`{otherwise}`' if otherwise != '' else 'none'}"
        case timedelta() as duration:
            return f"`{duration.days}d`" if duration.days else f"`{duration.seconds // 60}m`"
        case "":
            return "none"
        case default:
            return f"`{default}`"


def _environment() -> Env:
    env = Env()
    if os.environ.get("APP_ENV", DEVELOPMENT) == DEVELOPMENT and Path(".env").is_file():
        try:
            env.read_env(".env", recurse=False)  # for this reader only; the environment takes precedence
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"The file .env cannot be read: {error}") from error
    return env


def _field(name: str) -> Field[Any]:
    return next(setting for setting in fields(Settings) if setting.name == name)


def _value(setting: Field[Any], env: Env, app_env: str) -> Any:
    default = setting.metadata["default"]
    if isinstance(default, PerEnvironment):
        default = default.choose(app_env)
    # For environs, Ellipsis means "required".
    return _parsed(setting.metadata["parse"], env, setting.name.upper(), ... if default is MISSING else default)


def _parsed(parse: Parser, env: Env, name: str, default: Any) -> Any:
    try:
        os.environ.get(name, "").encode()
        return parse(env, name, default)
    except EnvValidationError as error:
        variable = str(error).split('"')[1]  # REDIS_URL also reads other variables
        raise invalid_setting(variable, " ".join(error.error_messages)) from error
    except EnvError as error:
        raise SettingsError(str(error)) from error
    except UnicodeEncodeError:
        raise invalid_setting(name, "Must be UTF-8.") from None


def _problems(settings: Settings) -> Iterator[str]:
    """Yield the violated rules that concern several settings or production; the first one prevents the start."""
    if settings.jwt_secret == settings.jwt_refresh_secret and settings.jwt_secret:
        yield 'Environment variable "JWT_REFRESH_SECRET" invalid: Must differ from JWT_SECRET.'
    for name in ("jwt_secret", "jwt_refresh_secret", "jwt_secret_previous", "jwt_refresh_secret_previous"):
        yield from _secret_problems(settings, name)
    if bool(settings.ops_username) != bool(settings.ops_password):
        yield 'Environment variable "OPS_PASSWORD" invalid: Set OPS_USERNAME and OPS_PASSWORD together.'
    if settings.production:
        if settings.bcrypt_rounds < MIN_PRODUCTION_BCRYPT_ROUNDS:
            yield 'Environment variable "BCRYPT_ROUNDS" invalid: Must be at least 10 in production.'
        if "*" in settings.cors_origin:
            yield 'Environment variable "CORS_ORIGIN" invalid: Must not be * in production.'


def _secret_problems(settings: Settings, name: str) -> Iterator[str]:
    value: str = getattr(settings, name)
    variable = name.upper()
    if not value:
        if not name.endswith("_previous"):
            yield f'Environment variable "{variable}" not set'
    elif len(value.encode()) < MIN_SECRET_BYTES:
        yield f'Environment variable "{variable}" invalid: Must have at least {MIN_SECRET_BYTES} bytes.'
    elif settings.production and value in _published_secrets():
        yield f'Environment variable "{variable}" invalid: Must not be the published development secret.'


def _published_secrets() -> Mapping[str, str]:
    return {
        setting.metadata["default"].development: setting.name
        for setting in fields(Settings)
        if setting.metadata["secret"] and isinstance(setting.metadata["default"], PerEnvironment)
    }
