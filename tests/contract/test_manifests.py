"""The Kubernetes manifests, against the published schemas, and what they promise about who reaches the hospital."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import generate_latest

from services.admission import Admission
from services.gateway.accounting import Accounts, Budget
from services.gateway.config import GatewaySettings
from services.gateway.metrics import Metrics
from services.server import read_settings

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
VERSIONS = ("1.30", kubernetes_validate.latest_version())
KUSTOMIZE = "kustomization.yaml"
NAME = re.compile(r"zo_gateway_\w+")


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


MANIFESTS = {
    f"{path.stem}-{one['kind']}": one
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != KUSTOMIZE
    for one in documents(path)
}
PODS = {
    name: one["spec"]["template"]["spec"] for name, one in MANIFESTS.items() if one["kind"] in ("Deployment", "Job")
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_what_the_schemas_allow(name: str, version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_kustomize_names_files_that_are_there() -> None:
    (kustomization,) = documents(FOLDER / KUSTOMIZE)
    for name in kustomization["resources"]:
        assert (FOLDER / name).is_file(), name


@pytest.mark.parametrize("name", PODS)
def test_pods_are_locked_down(name: str) -> None:
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        locked = container["securityContext"]
        assert locked["readOnlyRootFilesystem"] is True
        assert locked["allowPrivilegeEscalation"] is False
        assert locked["capabilities"] == {"drop": ["ALL"]}
        assert "limits" in container["resources"]


def test_nobody_but_gateway_and_trainer_reaches_the_hospital_and_it_reaches_nobody() -> None:
    policy = MANIFESTS["network-NetworkPolicy"]["spec"]
    labels = MANIFESTS["hospital-Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert "egress" not in policy
    (rule,) = policy["ingress"]
    (peer,) = rule["from"]
    (expression,) = peer["podSelector"]["matchExpressions"]
    assert (expression["operator"], set(expression["values"])) == ("In", {"gateway", "trainer"})


def test_the_autoscaler_asks_for_a_metric_that_the_gateway_has() -> None:
    metrics = Metrics()
    metrics.watch(Accounts(Budget()), {"images": Admission(1)}, lambda: ("1", "id"))
    (metric,) = MANIFESTS["gateway-HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert f"# TYPE {metric['pods']['metric']['name']} gauge" in generate_latest(metrics.registry).decode()


def test_the_dashboard_asks_for_what_the_gateway_exports() -> None:
    metrics = Metrics()
    metrics.watch(Accounts(Budget()), {"images": Admission(1)}, lambda: ("1", "id"))
    exported = set()
    for family in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        exported |= {family.name + suffix for suffix in suffixes}
    dashboard = json.loads((FOLDER.parent / "monitoring" / "dashboard.json").read_text())
    asked = {name for panel in dashboard["panels"] for one in panel["targets"] for name in NAME.findall(one["expr"])}
    assert len(asked) > 10
    assert asked <= exported


def test_compose_mounts_files_that_are_there_and_scrapes_the_port_that_is_served() -> None:
    compose = yaml.safe_load((FOLDER.parents[1] / "docker-compose.yml").read_text())
    mounts = [one for service in ("prometheus", "grafana") for one in compose["services"][service]["volumes"]]
    for mount in mounts:
        assert (FOLDER.parents[1] / mount.partition(":")[0]).is_file(), mount
    (job,) = yaml.safe_load((FOLDER.parent / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
    port = compose["services"]["gateway"]["environment"]["GATEWAY_METRICS_PORT"]
    assert job["dns_sd_configs"] == [{"names": ["gateway"], "type": "A", "port": int(port), "refresh_interval": "10s"}]


def test_settings_in_the_manifests_are_the_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = PODS["gateway-Deployment"]["containers"]
    for one in container["env"]:
        monkeypatch.setenv(one["name"], one["value"])
    settings = read_settings(GatewaySettings, [])
    named = {one["name"].removeprefix("GATEWAY_").lower() for one in container["env"]}
    assert named <= settings.model_fields_set


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="KServe has no release for this Python yet")
def test_the_inference_service_is_one_to_kserve() -> None:
    import kserve

    (manifest,) = documents(FOLDER / "kserve" / "inferenceservice.yaml")
    spec = manifest["spec"]
    for part, kind in (
        (manifest, kserve.V1beta1InferenceService),
        (spec, kserve.V1beta1InferenceServiceSpec),
        (spec["predictor"], kserve.V1beta1PredictorSpec),
        (spec["predictor"]["model"], kserve.V1beta1ModelSpec),
        (spec["transformer"], kserve.V1beta1TransformerSpec),
    ):
        assert set(part) <= set(kind.attribute_map.values()), kind.__name__
