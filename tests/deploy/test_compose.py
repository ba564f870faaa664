"""Test docker-compose.yml as far as possible without Docker.

compose-spec.json is the Compose Specification's own schema (Apache-2.0, compose-spec.LICENSE), an unchanged copy from
check-jsonschema 0.39.0.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml

from server import settings
from server.settings import Settings, SettingsError
from server.shutdown import server_stop_timeout, worker_stop_timeout
from tests.processes import ROOT

TEXT = (ROOT / "docker-compose.yml").read_text()
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
SCHEMA = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
IMAGE = "collaborative-workspace-backend"
OUR_SERVICES = {name: service for name, service in SERVICES.items() if service["image"] == IMAGE}
SERVERS = {name for name, service in OUR_SERVICES.items() if service["command"] == ["server"]}
ONE_SHOT = {name for name, service in SERVICES.items() if service["restart"] == "no"}
LONG_RUNNING = set(SERVICES) - ONE_SHOT
STORES = {"postgres", "valkey", "mongo"}
SECRETS = {
    "JWT_SECRET": "an-operators-own-access-secret-ABCDEF",
    "JWT_REFRESH_SECRET": "an-operators-own-refresh-secret-ABCDE",
}


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Interpolate a text as Compose does, in the only form that the file uses: ``${NAME:-default}``."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: variables.get(match[1]) or match[2], text)


def environment(service: str, **variables: str) -> dict[str, str]:
    """Return the environment of a container if ``.env`` has these variables."""
    declared = SERVICES[service].get("environment", {})
    return variables | {name: interpolate(value, variables) for name, value in declared.items()}


def load_settings(service: str, **variables: str) -> Settings:
    with mock.patch.dict(os.environ, environment(service, **variables), clear=True):
        return settings.load()


@pytest.fixture(autouse=True)
def without_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_file_is_valid_by_the_compose_specification() -> None:
    validator = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)
    assert [error.message for error in validator.iter_errors(FILE)] == []
    misspelt = {"services": {"nginx": {"image": "nginx", "helthcheck": {}}}}
    assert not validator.is_valid(misspelt)


def test_only_known_forms_are_interpolated() -> None:
    values = re.sub(r"^\s*#.*|\$\$", "", TEXT, flags=re.MULTILINE)
    assert re.findall(r"\$(?!\{\w+:-[^}]*\}).{,20}", values) == []


def test_our_image_is_built_once_before_its_containers_start_and_is_never_pulled() -> None:
    builders = {name for name, service in SERVICES.items() if "build" in service}
    assert builders == {"migrate"}
    for name, service in OUR_SERVICES.items():
        assert service["pull_policy"] == "never"
        assert name in builders or builders <= set(service["depends_on"])


@pytest.mark.parametrize(
    ("service", "image"), [("postgres", "postgres:17"), ("valkey", "valkey/valkey:8"), ("mongo", "mongo:8")]
)
def test_a_store_runs_its_official_image(service: str, image: str) -> None:
    assert SERVICES[service]["image"] == image


def test_the_service_has_two_servers_one_worker_and_one_migration() -> None:
    assert sorted(tuple(service["command"]) for service in OUR_SERVICES.values()) == [
        ("migrate",),
        ("server",),
        ("server",),
        ("worker",),
    ]
    assert {"migrate"} == ONE_SHOT


@pytest.mark.parametrize("service", OUR_SERVICES)
def test_a_plain_up_needs_no_configuration(service: str) -> None:
    development = load_settings(service)
    assert development.app_env == "development"
    assert (development.host, development.port) == ("0.0.0.0", 3000)


@pytest.mark.parametrize("service", OUR_SERVICES)
def test_production_does_not_start_without_its_own_secrets(service: str) -> None:
    with pytest.raises(SettingsError, match="JWT_SECRET"):
        load_settings(service, APP_ENV="production")
    assert load_settings(service, APP_ENV="production", **SECRETS).production


@pytest.mark.parametrize("service", OUR_SERVICES)
def test_an_env_file_for_development_cannot_change_the_addresses_of_the_stores(service: str) -> None:
    elsewhere = {"DATABASE_URL": "postgresql://localhost/app", "REDIS_HOST": "localhost", "HOST": "127.0.0.1"}
    assert load_settings(service, **elsewhere) == load_settings(service)


@pytest.mark.parametrize("service", OUR_SERVICES)
def test_containers_receive_known_settings_only(service: str) -> None:
    assert set(SERVICES[service]["environment"]) <= {name for name, _, _ in settings.documented_settings()}


@pytest.mark.parametrize("service", OUR_SERVICES)
def test_the_stores_are_addressed_with_their_own_names_and_password(service: str) -> None:
    configured = load_settings(service, STORES_PASSWORD="changed")
    postgres, mongo, valkey = (environment(name, STORES_PASSWORD="changed") for name in ("postgres", "mongo", "valkey"))
    urls = [urlsplit(url) for url in (configured.database_url, configured.mongodb_uri, configured.redis_url)]
    assert [url.hostname for url in urls] == ["postgres", "mongo", "valkey"]
    assert [url.username for url in urls] == [postgres["POSTGRES_USER"], mongo["MONGO_INITDB_ROOT_USERNAME"], ""]
    assert {url.password for url in urls} == {"changed"}
    assert postgres["POSTGRES_PASSWORD"] == mongo["MONGO_INITDB_ROOT_PASSWORD"] == valkey["PASSWORD"] == "changed"
    command = [interpolate(word, {"STORES_PASSWORD": "changed"}) for word in SERVICES["valkey"]["command"]]
    assert command[command.index("--requirepass") + 1] == "changed"
    assert urls[0].path == f"/{postgres['POSTGRES_DB']}"


@pytest.mark.parametrize("service", sorted(LONG_RUNNING))
def test_every_long_running_service_has_a_health_check(service: str) -> None:
    healthcheck = SERVICES[service].get("healthcheck")
    if service in SERVERS:
        assert healthcheck is None  # the image defines it
    else:
        assert healthcheck["test"][0] in ("CMD", "CMD-SHELL")


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_starts_after_its_dependencies_are_healthy(service: str) -> None:
    for dependency, condition in SERVICES[service].get("depends_on", {}).items():
        assert condition["condition"] == (
            "service_completed_successfully" if dependency in ONE_SHOT else "service_healthy"
        )


def test_servers_and_worker_wait_for_the_stores_and_the_migrations() -> None:
    for service in OUR_SERVICES.keys() - ONE_SHOT:
        assert set(SERVICES[service]["depends_on"]) == STORES | ONE_SHOT
    assert set(SERVICES["migrate"]["depends_on"]) == {"postgres"}
    assert set(SERVICES["nginx"]["depends_on"]) == SERVERS


def test_port_3000_is_the_only_published_port_and_bound_to_the_loopback_address() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert [interpolate(port, {}) for port in published.pop("nginx")] == ["127.0.0.1:3000:3000"]
    assert published == {}


def test_nginx_finds_every_server() -> None:
    conf = (ROOT / "scripts/deploy/nginx.conf").read_text()
    assert "./scripts/deploy/nginx.conf:/etc/nginx/nginx.conf:ro" in SERVICES["nginx"]["volumes"]
    upstreams = dict(re.findall(r"^\s+server ([\w-]+):(\d+) resolve", conf, re.MULTILINE))
    assert upstreams == {name: environment(name)["PORT"] for name in SERVERS}
    for name in SERVERS:
        assert set(SERVICES[name]["networks"]) & set(SERVICES["nginx"]["networks"])
    assert re.findall(r"^\s+listen (\d+)", conf, re.MULTILINE) == ["3000"]


def test_servers_trust_the_private_networks_of_docker_as_proxies() -> None:
    trusted = load_settings("server-1").trusted_proxies
    assert trusted
    assert all(network.is_private for network in trusted)


@pytest.mark.parametrize("service", OUR_SERVICES)
def test_a_container_with_our_code_has_no_unneeded_rights(service: str) -> None:
    definition = SERVICES[service]
    assert definition["read_only"] is True
    assert definition["cap_drop"] == ["ALL"]
    assert definition["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "user", "pid", "network_mode", "volumes"} & set(definition)


def test_the_worker_and_the_stores_have_no_route_to_the_internet() -> None:
    for service in ("worker", "migrate", *STORES):
        assert all(FILE["networks"][name]["internal"] for name in SERVICES[service]["networks"])


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_has_limits_of_memory_and_processes_and_rotates_its_logs(service: str) -> None:
    limits = SERVICES[service]["deploy"]["resources"]["limits"]
    assert set(limits) == {"memory", "pids"}
    assert SERVICES[service]["logging"] == {"driver": "local"}
    assert SERVICES[service]["restart"] in ("unless-stopped", "no")


@pytest.mark.parametrize("service", OUR_SERVICES)
def test_the_stop_grace_period_is_enough_for_a_graceful_shutdown(service: str) -> None:
    required = {"server": server_stop_timeout(load_settings(service)), "worker": worker_stop_timeout(), "migrate": 0}
    grace = SERVICES[service].get("stop_grace_period", "10s")
    assert int(grace.removesuffix("s")) >= required[SERVICES[service]["command"][0]]


def test_a_worker_exports_metrics_for_prometheus() -> None:
    assert load_settings("worker").metrics_port


def test_the_stores_keep_their_data_in_named_volumes() -> None:
    volumes = {name: SERVICES[name]["volumes"] for name in STORES}
    assert volumes == {
        "postgres": ["postgres:/var/lib/postgresql/data"],
        "valkey": ["valkey:/data"],
        "mongo": ["mongo:/data/db"],
    }
    assert set(FILE["volumes"]) == STORES
    command = SERVICES["valkey"]["command"]
    assert command[command.index("--appendonly") + 1] == "yes"
