"""The variants of the manifests in `deploy/`, and questions to their resources."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Settings, load
from tests.repository.manifests import KUSTOMIZE, NAMESPACE, Chart, Resource, kustomize, values_file

OVERLAYS = {"ollama": {"ollama"}, "vllm": {"vllm"}, "both": {"ollama", "vllm"}}


def chart_values(overlay: str, scaler: str | None) -> list[dict[str, Any]]:
    values = [] if overlay == "ollama" else [values_file(f"values-{overlay}.yaml")]
    if scaler is not None:
        values.append({"monitoring": {"serviceMonitor": True}, "autoscaling": {"kind": scaler}})
    return values


def built(tool: str, overlay: str, scaler: str | None = None) -> list[Resource]:
    if tool == "helm":
        return Chart().render(*chart_values(overlay, scaler))
    return kustomize(KUSTOMIZE / "overlays" / overlay, ["monitoring", scaler] if scaler else [])


VARIANTS = [("ollama", None), *((overlay, scaler) for overlay in ("vllm", "both") for scaler in (None, "keda", "hpa"))]
every_variant = pytest.mark.parametrize(
    ("tool", "overlay", "scaler"),
    [pytest.param(tool, *variant, id=f"{tool}-{variant[0]}-{variant[1]}")
     for tool in ("kustomize", "helm") for variant in VARIANTS],
)  # fmt: skip


def of_kind(resources: list[Resource], *kinds: str) -> list[Resource]:
    return [resource for resource in resources if resource["kind"] in kinds]


def named(resources: list[Resource], kind: str, name: str) -> Resource:
    (found,) = [resource for resource in of_kind(resources, kind) if resource["metadata"]["name"] == name]
    return found


def pods(resources: list[Resource]) -> dict[str, Resource]:
    """The pod templates, by the name of their Deployment or StatefulSet."""
    workloads = of_kind(resources, "Deployment", "StatefulSet")
    return {workload["metadata"]["name"]: workload["spec"]["template"] for workload in workloads}


def containers(pod: Resource) -> list[Resource]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def gateway(resources: list[Resource]) -> Resource:
    (container,) = pods(resources)["gateway"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return dict(selector.get("matchLabels", {})).items() <= labels.items()


def selected(selector: Mapping[str, Any], resources: list[Resource]) -> set[str]:
    return {name for name, pod in pods(resources).items() if matches(selector, pod["metadata"]["labels"])}


def port_number(pod: Resource, port: str | int) -> int:
    ports = {item["name"]: item["containerPort"] for item in pod["spec"]["containers"][0]["ports"]}
    return int(ports[port]) if isinstance(port, str) else port


def reaches(resources: list[Resource], source: Mapping[str, str], namespace: str, target: str, port: str) -> bool:
    """Return whether the NetworkPolicies let a pod with these labels reach a port of `target`."""
    pod = pods(resources)[target]
    policies = [
        policy["spec"]
        for policy in of_kind(resources, "NetworkPolicy")
        if matches(policy["spec"]["podSelector"], pod["metadata"]["labels"])
    ]
    assert all(policy["policyTypes"] == ["Ingress"] for policy in policies)
    return not policies or any(
        _peer_allowed(rule, source, namespace) and _port_allowed(rule, pod, port)
        for policy in policies
        for rule in policy["ingress"]
    )


def _peer_allowed(rule: Mapping[str, Any], source: Mapping[str, str], namespace: str) -> bool:
    if not rule.get("from"):
        return True
    for peer in rule["from"]:
        assert set(peer) <= {"podSelector", "namespaceSelector"}
        is_there = (
            matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
            if "namespaceSelector" in peer
            else namespace == NAMESPACE
        )
        if is_there and matches(peer.get("podSelector", {}), source):
            return True
    return False


def _port_allowed(rule: Mapping[str, Any], pod: Resource, port: str) -> bool:
    wanted = port_number(pod, port)
    return not rule.get("ports") or wanted in {port_number(pod, item["port"]) for item in rule["ports"]}


def settings(resources: list[Resource], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Load the settings as the container does, with its files below `folder`."""
    monkeypatch.chdir(folder)
    data = named(resources, "ConfigMap", "gateway-config")["data"]
    (folder / "gateway.yaml").write_text(data["gateway.yaml"])
    (folder / "client-keys").write_text("sk-0123456789abcdef0123\n")
    environment = {"GATEWAY_HOST": "0.0.0.0", "GATEWAY_STATE_FILE": "/var/lib/gateway/state.json"}  # of the image
    for item in gateway(resources)["env"]:
        secret = item.get("valueFrom", {}).get("secretKeyRef")
        environment[item["name"]] = f"{secret['name']}-{secret['key']}" if secret else item["value"]
    environment["GATEWAY_CONFIG"] = str(folder / "gateway.yaml")
    environment["GATEWAY_API_KEYS_FILE"] = str(folder / "client-keys")
    return load(environ=environment)
