"""The manifests are what Kubernetes takes, and say what the program and its image say."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.cli import main
from server.ending import server_seconds, worker_seconds
from server.settings import Settings
from tests.observability.test_observability import rules

FOLDER = Path(__file__).parents[2] / "scripts" / "deploy" / "kubernetes"
VERSIONS = ("1.31", "1.37")
USER = 10001  # the image's
NOT_MANIFESTS = {"kustomization.yaml"}


def manifests() -> list[dict[str, Any]]:
    files = sorted(path for path in FOLDER.glob("*.yaml") if path.name not in NOT_MANIFESTS)
    return [document for path in files for document in yaml.safe_load_all(path.read_text())]


def named(manifest: dict[str, Any]) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def pods() -> list[tuple[str, dict[str, Any]]]:
    return [
        (named(each), each["spec"]["template"]["spec"]) for each in manifests() if "template" in each.get("spec", {})
    ]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["containers"], *pod.get("initContainers", [])]


def find(kind: str, name: str) -> dict[str, Any]:
    return next(each for each in manifests() if named(each) == f"{kind} {name}")


def variables(name: str) -> dict[str, str]:
    lines = (FOLDER / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", manifests(), ids=named)
def test_each_is_valid_by_the_published_schemas(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_would_notice_a_misspelt_field() -> None:
    broken = find("Deployment", "server")
    broken["spec"]["template"]["spec"]["terminationGraceSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_kustomize_takes_every_file_and_finds_what_it_makes() -> None:
    file = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert set(file["resources"]) == {path.name for path in FOLDER.glob("*.yaml")} - NOT_MANIFESTS
    images = {container["image"] for _, pod in pods() for container in containers(pod)}
    assert {each["name"] for each in file["images"]} == images
    made = {("configMapRef", each["name"]) for each in file["configMapGenerator"]}
    made |= {("secretRef", each["name"]) for each in file["secretGenerator"]}
    used = [each for _, pod in pods() for container in containers(pod) for each in container["envFrom"]]
    assert {(kind, what["name"]) for each in used for kind, what in each.items()} == made
    for generator in (*file["configMapGenerator"], *file["secretGenerator"]):
        for name in generator["envs"]:
            assert any((FOLDER / each).exists() for each in (name, f"{name}.example")), name
    accounts = {pod["serviceAccountName"] for _, pod in pods()}
    assert accounts == {each["metadata"]["name"] for each in manifests() if each["kind"] == "ServiceAccount"}


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_have_no_right_that_they_do_not_need(name: str, pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == USER
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in containers(pod):
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_service_named_redis_does_not_overwrite_a_setting(name: str, pod: dict[str, Any]) -> None:
    assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_their_commands_exist(name: str, pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for container in containers(pod):
        words = container.get("args") or re.findall(r"run\.py (\w+)", container["command"][-1])
        monkeypatch.setattr(sys, "argv", ["run.py", *words, "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0


def test_a_pod_is_given_the_time_that_it_takes_to_drain(settings: Settings) -> None:
    pod = find("Deployment", "server")["spec"]["template"]["spec"]
    pause = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    told = dataclasses.replace(settings, drain_seconds=float(variables("settings.env")["DRAIN_SECONDS"]))
    assert pod["terminationGracePeriodSeconds"] >= pause + server_seconds(told)
    worker = find("Deployment", "worker")["spec"]["template"]["spec"]
    assert worker["terminationGracePeriodSeconds"] >= worker_seconds()


def test_prometheus_finds_the_workers_and_may_ask_them() -> None:
    template = find("Deployment", "worker")["spec"]["template"]
    [container] = template["spec"]["containers"]
    [port] = [each["value"] for each in container["env"] if each["name"] == "METRICS_PORT"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == port
    assert [each["containerPort"] for each in container["ports"]] == [int(port)]
    assert template["spec"]["containers"][0]["livenessProbe"]["httpGet"]["port"] == container["ports"][0]["name"]
    [ingress] = find("NetworkPolicy", "worker")["spec"]["ingress"]
    assert [each["port"] for each in ingress["ports"]] == [int(port)]
    assert {"OPS_USERNAME", "OPS_PASSWORD"} <= variables("secrets.env.example").keys()


def test_the_autoscaler_reads_one_series_that_is_recorded() -> None:
    metrics = find("HorizontalPodAutoscaler", "worker")["spec"]["metrics"]
    [external] = [each["external"] for each in metrics if each["type"] == "External"]
    [recorded] = [rule for rule in rules("record") if rule["record"] == external["metric"]["name"]]
    assert re.match(r"sum ?\(|max ?\(", recorded["expr"]), "by no label"
    # Kubernetes divides it by the number of pods that it wants: less than a worker runs at once, or one is enough.
    assert external["target"]["type"] == "AverageValue"
    assert 1 < int(external["target"]["averageValue"]) <= default_of("worker_concurrency")


def default_of(setting: str) -> Any:
    [field] = [each for each in dataclasses.fields(Settings) if each.name == setting]
    return field.metadata["default"]


@pytest.mark.parametrize("name", ["server", "worker"])
def test_probes_ask_the_process_at_paths_that_exist(name: str) -> None:
    [container] = find("Deployment", name)["spec"]["template"]["spec"]["containers"]
    probes = {kind: probe for kind, probe in container.items() if kind.endswith("Probe")}
    assert {"livenessProbe", "startupProbe"} <= set(probes)
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {port["name"] for port in container["ports"]}
    paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
    assert paths.pop("readinessProbe", "/health/ready") == "/health/ready"
    assert set(paths.values()) == {"/health"}


@pytest.mark.parametrize("name", ["server", "worker"])
def test_budget_and_autoscaler_are_about_their_deployment(name: str) -> None:
    labels = find("Deployment", name)["spec"]["template"]["metadata"]["labels"]
    assert find("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert find("HorizontalPodAutoscaler", name)["spec"]["scaleTargetRef"]["name"] == name
    assert "replicas" not in find("Deployment", name)["spec"]


def test_every_setting_that_is_given_exists() -> None:
    given = variables("settings.env").keys() | variables("secrets.env.example").keys()
    known = {name.upper() for name in Settings.__dataclass_fields__}
    assert given <= known


def test_secrets_are_not_in_the_settings() -> None:
    assert not {name for name in variables("settings.env") if re.search("SECRET|PASSWORD|URL|URI", name)}
