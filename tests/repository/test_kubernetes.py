"""The manifests and the chart in `deploy/` are valid, consistent with each other and with the gateway."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml
from prometheus_client import CollectorRegistry

from gateway.config import VARIABLES
from gateway.telemetry.metrics import Metrics
from gateway.upstream.server_names import MAX_SERVERS
from tests.repository.cluster import (
    OVERLAYS,
    VARIANTS,
    built,
    chart_values,
    containers,
    every_variant,
    gateway,
    matches,
    named,
    of_kind,
    pods,
    port_number,
    selected,
    settings,
)
from tests.repository.manifests import CHART, KUSTOMIZE, NAMESPACE, ROOT, Chart, Resource, parse, values_file

CUSTOM_KINDS = {"ServiceMonitor", "ScaledObject"}
KUBERNETES_VERSIONS = ("1.30", "1.33")
# Secrets that the operator creates, and their keys.
SECRETS = {"gateway-keys": {"admin-key", "client-keys"}, "vllm-keys": {"api-key", "hf-token"}}


@pytest.fixture
def resources(tool: str, overlay: str, scaler: str | None) -> list[Resource]:
    return built(tool, overlay, scaler)


# Files


def reached_from(folder: Path) -> Iterator[Path]:
    (described,) = parse((folder / "kustomization.yaml").read_text())
    yield folder / "kustomization.yaml"
    names = [*described.get("resources", []), *described.get("components", [])]
    names += [patch["path"] for patch in described.get("patches", [])]
    names += [file for generator in described.get("configMapGenerator", []) for file in generator["files"]]
    for name in names:
        path = (folder / name).resolve()
        yield from reached_from(path) if path.is_dir() else [path]


def test_every_file_belongs_to_an_overlay_or_a_component() -> None:
    tops = [*(KUSTOMIZE / "overlays").iterdir(), *(KUSTOMIZE / "components").iterdir()]
    used = {path for folder in tops for path in reached_from(folder)}
    assert used == {path for path in KUSTOMIZE.rglob("*") if path.is_file()}


@every_variant
def test_resource_is_valid_in_its_api(resources: list[Resource]) -> None:
    pytest.importorskip("kubernetes_validate")
    for resource in resources:
        if resource["kind"] not in CUSTOM_KINDS:
            check_schema(json.dumps(resource, sort_keys=True))


@cache
def check_schema(resource: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(json.loads(resource), version, strict=True)


@every_variant
def test_resource_occurs_once(resources: list[Resource]) -> None:
    names = [(resource["kind"], resource["metadata"]["name"]) for resource in resources]
    assert len(names) == len(set(names))


@every_variant
def test_variant_has_the_engines_of_its_name(resources: list[Resource], overlay: str) -> None:
    assert set(pods(resources)) == {"gateway"} | OVERLAYS[overlay]


@pytest.mark.parametrize(("overlay", "scaler"), VARIANTS)
def test_chart_and_kustomization_give_the_same_resources(overlay: str, scaler: str | None) -> None:
    def comparable(resources: list[Resource]) -> dict[tuple[str, str], Resource]:
        result = {}
        for resource in resources:
            if resource["kind"] == "Namespace":
                continue  # helm has --create-namespace
            resource["metadata"].pop("namespace", None)
            if resource["kind"] == "ConfigMap":
                resource["metadata"].pop("labels", None)
                resource["data"] = {name: yaml.safe_load(text) for name, text in resource["data"].items()}
            result[resource["kind"], resource["metadata"]["name"]] = resource
        return result

    assert comparable(built("helm", overlay, scaler)) == comparable(built("kustomize", overlay, scaler))


def test_every_value_of_the_chart_is_used_and_checked() -> None:
    chart = Chart()
    for scaler in ("keda", "hpa"):
        chart.render(*chart_values("both", scaler))
    values = values_file("values.yaml")
    (schema,) = [json.loads((CHART / "values.schema.json").read_text())]
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(values, schema)
    for section, content in values.items():
        if section in ("config", "imagePullSecrets"):
            assert section in chart.used
            continue
        assert set(schema["properties"][section]["properties"]) == set(content)
        for key in content:
            assert any(path == f"{section}.{key}" or path.startswith(f"{section}.{key}.") for path in chart.used), key
    mistakes: list[dict[str, Any]] = [{"autoscaling": {"kind": "KEDA"}}, {"vlm": {}}, {"vllm": {"replicas": 2}}]
    for wrong in mistakes:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_chart_without_a_vllm_has_no_autoscaler() -> None:
    resources = Chart().render({"autoscaling": {"kind": "keda"}})
    assert not of_kind(resources, "ScaledObject", "HorizontalPodAutoscaler")
    assert "GATEWAY__BACKENDS__VLLM__SERVERS" not in {item["name"] for item in gateway(resources)["env"]}


def test_chart_places_pods_and_chooses_the_storage() -> None:
    placed = {"nodeSelector": {"gpu": "a100"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}
    values = {name: placed | {"storage": {"className": "fast"}} for name in ("gateway", "ollama", "vllm")}
    resources = Chart().render(values_file("values-both.yaml"), values, {"imagePullSecrets": [{"name": "registry"}]})
    for pod in pods(resources).values():
        assert {key: pod["spec"][key] for key in placed} == placed
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    claims = [claim["spec"] for claim in of_kind(resources, "PersistentVolumeClaim")]
    claims += [claim["spec"] for claim in named(resources, "StatefulSet", "vllm")["spec"]["volumeClaimTemplates"]]
    assert [claim["storageClassName"] for claim in claims] == ["fast"] * 3


# References


@every_variant
def test_selector_finds_the_pods_of_its_name(resources: list[Resource]) -> None:
    for resource in of_kind(resources, "Deployment", "StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = resource["spec"]
        selector = {"matchLabels": spec["selector"]} if resource["kind"] == "Service" else spec.get("selector")
        assert selected(selector or spec["podSelector"], resources) == {resource["metadata"]["name"]}


@every_variant
def test_every_named_port_and_volume_exists(resources: list[Resource]) -> None:
    templates = pods(resources)
    for service in of_kind(resources, "Service"):
        for port in service["spec"]["ports"]:
            assert port_number(templates[service["metadata"]["name"]], port["targetPort"]) == port["port"]
    for name, pod in templates.items():
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        if name == "vllm":
            claims = named(resources, "StatefulSet", name)["spec"]["volumeClaimTemplates"]
            volumes |= {claim["metadata"]["name"] for claim in claims}
        used = [mount for container in containers(pod) for mount in container["volumeMounts"]]
        assert {mount["name"] for mount in used} == volumes
        assert all("subPath" not in mount for mount in used), "Kubernetes never updates such a mount"


@every_variant
def test_volume_and_secret_that_a_pod_needs_exists(resources: list[Resource]) -> None:
    claims = {claim["metadata"]["name"] for claim in of_kind(resources, "PersistentVolumeClaim")}
    claimed = set()
    for pod in pods(resources).values():
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume:
                assert "gateway.yaml" in named(resources, "ConfigMap", volume["configMap"]["name"])["data"]
            if "secret" in volume:
                assert volume["secret"]["secretName"] in SECRETS
            if "persistentVolumeClaim" in volume:
                claimed.add(volume["persistentVolumeClaim"]["claimName"])
        for container in containers(pod):
            for item in container["env"]:
                if "valueFrom" in item:
                    reference = item["valueFrom"]["secretKeyRef"]
                    assert reference["key"] in SECRETS[reference["name"]]
                    assert reference.get("optional", False) is (reference["name"] == "vllm-keys")
    assert claimed == claims


@every_variant
def test_variable_of_the_gateway_exists_and_names_a_mounted_file(resources: list[Resource]) -> None:
    container, spec = gateway(resources), pods(resources)["gateway"]["spec"]
    given = {item["name"]: item.get("value", "") for item in container["env"]}
    assert {name for name in given if "__" not in name} <= set(VARIABLES)
    folders = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert given["GATEWAY_CONFIG"] == f"{folders['config']}/gateway.yaml"
    (keys,) = [volume for volume in spec["volumes"] if volume["name"] == "keys"]
    assert given["GATEWAY_API_KEYS_FILE"] == f"{folders['keys']}/client-keys"
    assert "client-keys" in SECRETS[keys["secret"]["secretName"]]
    assert "items" not in keys["secret"], "a file that the operator adds to the Secret is there, too"


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_documentation_creates_the_secrets(name: str) -> None:
    page = (ROOT / "docs" / "operations" / "kubernetes.md").read_text()
    (command,) = re.findall(rf"create secret generic {name}((?:.*\\\n)*.*)", page)
    assert set(re.findall(r"--from-(?:literal|file)=([\w-]+)", command)) == SECRETS[name]


# The gateway


@every_variant
def test_gateway_accepts_its_settings_without_a_warning(
    resources: list[Resource], overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = settings(resources, tmp_path, monkeypatch)
    assert loaded.warnings == ()
    assert {name for tier in loaded.tiers.values() for name in tier.models} == OVERLAYS[overlay]
    assert loaded.port == port_number(pods(resources)["gateway"], "http")
    assert loaded.metrics_port == port_number(pods(resources)["gateway"], "metrics")


@every_variant
def test_settings_name_the_engines_that_are_there(
    resources: list[Resource], overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = settings(resources, tmp_path, monkeypatch)
    for name in OVERLAYS[overlay]:
        backend = loaded.backends[name]
        (server,) = backend.servers
        address = urlsplit(server.base_url)
        service = named(resources, "Service", address.hostname or "")["spec"]
        assert address.port == service["ports"][0]["port"]
        is_headless = service.get("clusterIP") == "None"
        assert (server.is_name, is_headless) == (backend.kind == "vllm", backend.kind == "vllm")
        assert "publishNotReadyAddresses" not in service, "a pod that is not ready gets no requests"
    models = loaded.tiers["standard"].models
    if "ollama" in OVERLAYS[overlay]:
        (pull,) = pods(resources)["ollama"]["spec"]["initContainers"]
        assert {"name": "MODEL", "value": models["ollama"]} in pull["env"]
    if "vllm" in OVERLAYS[overlay]:
        command = pods(resources)["vllm"]["spec"]["containers"][0]["args"]
        assert command[0] == models["vllm"]
        assert f"--max-num-seqs={loaded.backends['vllm'].limits.max_concurrency}" in command


@every_variant
def test_pod_has_time_to_drain(resources: list[Resource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = settings(resources, tmp_path, monkeypatch)
    pause = gateway(resources)["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = pause + loaded.drain_delay + loaded.drain_timeout + 5
    assert pods(resources)["gateway"]["spec"]["terminationGracePeriodSeconds"] >= needed
    if "vllm" in pods(resources):
        spec = pods(resources)["vllm"]["spec"]
        (container,) = spec["containers"]
        (timeout,) = re.findall(r"--shutdown-timeout=(\d+)", " ".join(container["args"]))
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert spec["terminationGracePeriodSeconds"] > pause + int(timeout)
        # CoreDNS keeps an answer for 5 s.
        assert pause > 5 + loaded.backends["vllm"].probe_interval


@every_variant
def test_container_is_probed_at_its_own_port(resources: list[Resource]) -> None:
    paths = {"gateway": ("/readyz", "/healthz"), "ollama": ("/", "/"), "vllm": ("/health", "/health")}
    for name, pod in pods(resources).items():
        (container,) = pod["spec"]["containers"]
        probes = [container[probe]["httpGet"] for probe in ("readinessProbe", "livenessProbe")]
        assert [probe["path"] for probe in probes] == list(paths[name])
        assert {probe["port"] for probe in probes} == {"http"}
    assert gateway(resources)["startupProbe"]["httpGet"]["path"] == "/healthz"


@every_variant
def test_there_is_one_gateway_and_its_node_can_be_drained(resources: list[Resource]) -> None:
    spec = named(resources, "Deployment", "gateway")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    budget = named(resources, "PodDisruptionBudget", "gateway")["spec"]
    assert budget["maxUnavailable"] == 1


# Metrics and autoscaling


def metric_labels() -> dict[str, tuple[str, ...]]:
    registry = CollectorRegistry()
    metrics = Metrics(registry, "0")
    metrics.waiting.labels("vllm", "text").set(0)
    metrics.running.labels("vllm", "text").set(0)
    return {sample.name: tuple(sample.labels) for family in registry.collect() for sample in family.samples}


@every_variant
def test_prometheus_finds_the_metrics_of_the_gateway(resources: list[Resource], scaler: str | None) -> None:
    monitors = of_kind(resources, "ServiceMonitor")
    assert len(monitors) == (scaler is not None)
    for monitor in monitors:
        assert set(monitor["spec"]) == {"selector", "endpoints"}
        found = [service for service in of_kind(resources, "Service")
                 if matches(monitor["spec"]["selector"], service["metadata"]["labels"])]  # fmt: skip
        assert [service["metadata"]["name"] for service in found] == ["gateway"]
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in found[0]["spec"]["ports"]}
        assert endpoint["path"] == "/metrics"


@pytest.mark.parametrize("tool", ["kustomize", "helm"])
@pytest.mark.parametrize("overlay", ["vllm", "both"])
@pytest.mark.parametrize("scaler", ["keda", "hpa"])
def test_autoscaler_scales_by_what_the_gateway_reports(
    resources: list[Resource], scaler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = of_kind(resources, "ScaledObject", "HorizontalPodAutoscaler")
    spec = found["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "vllm"}
    assert "replicas" not in named(resources, "StatefulSet", "vllm")["spec"], "applying it would undo the autoscaler"
    lowest, highest = ("minReplicaCount", "maxReplicaCount") if scaler == "keda" else ("minReplicas", "maxReplicas")
    vllm = settings(resources, tmp_path, monkeypatch).backends["vllm"]
    assert 1 <= spec[lowest] < spec[highest] <= MAX_SERVERS
    targets = keda_targets(spec) if scaler == "keda" else hpa_targets(spec)
    assert set(targets) == {"gateway_requests_waiting", "gateway_requests_running"}
    assert set(targets) <= set(metric_labels())
    assert all("backend" in metric_labels()[name] for name in targets)
    assert 0 < targets["gateway_requests_running"] < vllm.limits.max_concurrency, (
        "another one starts before all is full"
    )


def keda_targets(spec: Resource) -> dict[str, int]:
    targets = {}
    for trigger in spec["triggers"]:
        assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
        metadata = trigger["metadata"]
        assert all(isinstance(value, str) for value in metadata.values()), "KEDA's metadata is text"
        assert set(metadata) == {"serverAddress", "query", "threshold", "ignoreNullValues"}
        query = re.fullmatch(rf'sum\((\w+)\{{namespace="{NAMESPACE}",backend="vllm"\}}\)', metadata["query"])
        assert query is not None
        targets[query[1]] = int(metadata["threshold"])
    return targets


def hpa_targets(spec: Resource) -> dict[str, int]:
    targets = {}
    for metric in spec["metrics"]:
        external = metric["external"]
        assert external["metric"]["selector"] == {"matchLabels": {"backend": "vllm"}}
        assert external["target"]["type"] == "AverageValue"
        targets[external["metric"]["name"]] = int(external["target"]["averageValue"])
    return targets
