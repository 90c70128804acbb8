"""The pods in `deploy/` have no rights that they do not need, and only the gateway reaches the engines."""

import re
from pathlib import Path

import pytest

from tests.repository.cluster import OVERLAYS, built, containers, every_variant, gateway, named, of_kind, pods, reaches
from tests.repository.manifests import NAMESPACE, ROOT, Resource

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


@pytest.fixture
def resources(tool: str, overlay: str, scaler: str | None) -> list[Resource]:
    return built(tool, overlay, scaler)


@every_variant
def test_pod_meets_the_restricted_standard(resources: list[Resource]) -> None:
    for pod in pods(resources).values():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] >= 10000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        assert all(set(volume) - {"name"} <= {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
                   for volume in pod["spec"]["volumes"])  # fmt: skip
        for container in containers(pod):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not {"privileged", "runAsUser", "runAsNonRoot"} & set(container["securityContext"])
            assert all("hostPort" not in port for port in container.get("ports", []))


@every_variant
def test_pod_gets_neither_a_token_nor_variables_of_services(resources: list[Resource]) -> None:
    for pod in pods(resources).values():
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["enableServiceLinks"] is False


@every_variant
def test_gateway_can_write_its_state_and_nothing_else(resources: list[Resource]) -> None:
    container, spec = gateway(resources), pods(resources)["gateway"]["spec"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    written = re.findall(r"GATEWAY_(?:STATE|USAGE)_FILE=(\S+)", DOCKERFILE)
    assert len(written) == 2
    assert writable == sorted({str(Path(file).parent) for file in written})
    (user,) = re.findall(r"--uid (\d+)", DOCKERFILE)
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == int(user)


def test_namespace_enforces_the_restricted_standard() -> None:
    namespace = named(built("kustomize", "both"), "Namespace", NAMESPACE)
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@every_variant
def test_only_the_gateway_reaches_an_engine(resources: list[Resource], overlay: str) -> None:
    templates = pods(resources)
    own = templates["gateway"]["metadata"]["labels"]
    for engine in OVERLAYS[overlay]:
        assert reaches(resources, own, NAMESPACE, engine, "http")
        assert not reaches(resources, own, "elsewhere", engine, "http")
        assert not reaches(resources, {}, NAMESPACE, engine, "http")
        assert not reaches(resources, {"app.kubernetes.io/name": "prometheus"}, "monitoring", engine, "http")
        for other in OVERLAYS[overlay]:
            assert not reaches(resources, templates[other]["metadata"]["labels"], NAMESPACE, engine, "http")


@every_variant
def test_everybody_reaches_the_api_and_only_prometheus_the_metrics(resources: list[Resource]) -> None:
    for namespace in (NAMESPACE, "elsewhere", "monitoring"):
        assert reaches(resources, {}, namespace, "gateway", "http")
        assert reaches(resources, {}, namespace, "gateway", "metrics") is (namespace == "monitoring")


@every_variant
def test_manifests_have_no_secret_values(resources: list[Resource]) -> None:
    assert not of_kind(resources, "Secret")
    for pod in pods(resources).values():
        for container in containers(pod):
            for item in container["env"]:
                assert ("valueFrom" in item) == bool(re.search(r"_KEY$|_TOKEN$", item["name"])), item
