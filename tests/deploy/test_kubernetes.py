"""The manifests are valid, and agree with the program and its image."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.cli import main
from server.settings import Settings
from server.shutdown import server_stop_timeout, worker_stop_timeout
from tests.observability.test_observability import rules

FOLDER = Path(__file__).parents[2] / "scripts" / "deploy" / "kubernetes"
VERSIONS = ("1.31", "1.37")
USER = 10001  # the image's
NOT_MANIFESTS = {"kustomization.yaml"}


def manifests() -> list[dict[str, Any]]:
    files = sorted(path for path in FOLDER.glob("*.yaml") if path.name not in NOT_MANIFESTS)
    return [document for path in files for document in yaml.safe_load_all(path.read_text())]


def title(manifest: dict[str, Any]) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def pods() -> list[tuple[str, dict[str, Any]]]:
    return [
        (title(manifest), manifest["spec"]["template"]["spec"])
        for manifest in manifests()
        if "template" in manifest.get("spec", {})
    ]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["containers"], *pod.get("initContainers", [])]


def find_manifest(kind: str, name: str) -> dict[str, Any]:
    return next(manifest for manifest in manifests() if title(manifest) == f"{kind} {name}")


def variables(name: str) -> dict[str, str]:
    lines = (FOLDER / name).read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", manifests(), ids=title)
def test_a_manifest_is_valid_by_the_published_schemas(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_detect_a_misspelt_field() -> None:
    broken = find_manifest("Deployment", "server")
    broken["spec"]["template"]["spec"]["terminationGraceSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_kustomize_uses_every_file_and_generates_every_reference() -> None:
    file = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert set(file["resources"]) == {path.name for path in FOLDER.glob("*.yaml")} - NOT_MANIFESTS
    images = {container["image"] for _, pod in pods() for container in containers(pod)}
    assert {image["name"] for image in file["images"]} == images
    generated = {("configMapRef", generator["name"]) for generator in file["configMapGenerator"]}
    generated |= {("secretRef", generator["name"]) for generator in file["secretGenerator"]}
    used = [source for _, pod in pods() for container in containers(pod) for source in container["envFrom"]]
    assert {(kind, reference["name"]) for source in used for kind, reference in source.items()} == generated
    for generator in (*file["configMapGenerator"], *file["secretGenerator"]):
        for name in generator["envs"]:
            assert any((FOLDER / path).exists() for path in (name, f"{name}.example")), name
    accounts = {pod["serviceAccountName"] for _, pod in pods()}
    assert accounts == {
        manifest["metadata"]["name"] for manifest in manifests() if manifest["kind"] == "ServiceAccount"
    }


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_have_no_unneeded_rights(name: str, pod: dict[str, Any]) -> None:
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
def test_the_commands_of_pods_exist(name: str, pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for container in containers(pod):
        words = container.get("args") or re.findall(r"run\.py (\w+)", container["command"][-1])
        monkeypatch.setattr(sys, "argv", ["run.py", *words, "--help"])
        with pytest.raises(SystemExit) as exited:
            main()
        assert exited.value.code == 0


def test_the_termination_grace_period_is_enough_for_a_graceful_shutdown(settings: Settings) -> None:
    pod = find_manifest("Deployment", "server")["spec"]["template"]["spec"]
    pause = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    configured = dataclasses.replace(settings, drain_seconds=float(variables("settings.env")["DRAIN_SECONDS"]))
    assert pod["terminationGracePeriodSeconds"] >= pause + server_stop_timeout(configured)
    worker = find_manifest("Deployment", "worker")["spec"]["template"]["spec"]
    assert worker["terminationGracePeriodSeconds"] >= worker_stop_timeout()


def test_prometheus_can_find_and_scrape_the_workers() -> None:
    template = find_manifest("Deployment", "worker")["spec"]["template"]
    [container] = template["spec"]["containers"]
    [port] = [variable["value"] for variable in container["env"] if variable["name"] == "METRICS_PORT"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == port
    assert [declared["containerPort"] for declared in container["ports"]] == [int(port)]
    assert template["spec"]["containers"][0]["livenessProbe"]["httpGet"]["port"] == container["ports"][0]["name"]
    [ingress] = find_manifest("NetworkPolicy", "worker")["spec"]["ingress"]
    assert [allowed["port"] for allowed in ingress["ports"]] == [int(port)]
    assert {"OPS_USERNAME", "OPS_PASSWORD"} <= variables("secrets.env.example").keys()


def test_the_autoscaler_reads_one_recorded_series() -> None:
    metrics = find_manifest("HorizontalPodAutoscaler", "worker")["spec"]["metrics"]
    [external] = [metric["external"] for metric in metrics if metric["type"] == "External"]
    [recorded] = [rule for rule in rules("record") if rule["record"] == external["metric"]["name"]]
    assert re.match(r"sum ?\(|max ?\(", recorded["expr"]), "it must have no labels"
    # The autoscaler runs one pod for each `averageValue` of the metric, so this must not exceed a worker's concurrency.
    assert external["target"]["type"] == "AverageValue"
    assert 1 < int(external["target"]["averageValue"]) <= default_of("worker_concurrency")


def default_of(setting: str) -> Any:
    [field] = [field for field in dataclasses.fields(Settings) if field.name == setting]
    return field.metadata["default"]


@pytest.mark.parametrize("name", ["server", "worker"])
def test_probes_use_existing_ports_and_paths(name: str) -> None:
    [container] = find_manifest("Deployment", name)["spec"]["template"]["spec"]["containers"]
    probes = {kind: probe for kind, probe in container.items() if kind.endswith("Probe")}
    assert {"livenessProbe", "startupProbe"} <= set(probes)
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {port["name"] for port in container["ports"]}
    paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
    assert paths.pop("readinessProbe", "/health/ready") == "/health/ready"
    assert set(paths.values()) == {"/health"}


@pytest.mark.parametrize("name", ["server", "worker"])
def test_the_disruption_budget_and_the_autoscaler_refer_to_their_deployment(name: str) -> None:
    labels = find_manifest("Deployment", name)["spec"]["template"]["metadata"]["labels"]
    assert find_manifest("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert find_manifest("HorizontalPodAutoscaler", name)["spec"]["scaleTargetRef"]["name"] == name
    assert "replicas" not in find_manifest("Deployment", name)["spec"]


def test_every_configured_setting_exists() -> None:
    configured = variables("settings.env").keys() | variables("secrets.env.example").keys()
    known = {name.upper() for name in Settings.__dataclass_fields__}
    assert configured <= known


def test_the_settings_contain_no_secrets() -> None:
    assert not {name for name in variables("settings.env") if re.search("SECRET|PASSWORD|URL|URI", name)}
