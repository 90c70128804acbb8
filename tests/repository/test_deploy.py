"""The compose file, the image and `.ci/run` agree with the code and with what they name."""

import http.client
import json
import re
import tomllib
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

from gateway.config import VARIABLES

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
ENGINES = ("ollama", "ollama-cpu", "vllm")
# Variables that Ollama and vLLM read themselves.
FOREIGN_VARIABLES = {"OLLAMA_HOST", "HF_TOKEN"}
# Variables of the compose file alone. A name that begins with GATEWAY_ would be taken for a setting.
ASKED = {
    *("GPU_COUNT", "GPU_SHARE", "HF_TOKEN", "MAX_MODEL_LEN", "OLLAMA_IMAGE", "PUBLISH_ADDRESS", "VLLM_IMAGE"),
    *("GATEWAY_2_PORT", "REDIS_IMAGE"),
    *("GPU_EXPORTER_IMAGE", "GRAFANA_ADDRESS", "GRAFANA_IMAGE", "GRAFANA_PASSWORD", "GRAFANA_PORT", "PROMETHEUS_IMAGE"),
}
# The keys of a service that we use, of those that the compose specification has. Another is likely misspelt.
KNOWN_KEYS = {
    *(
        "build",
        "cap_drop",
        "command",
        "depends_on",
        "deploy",
        "entrypoint",
        "environment",
        "healthcheck",
        "image",
        "ipc",
        "networks",
        "ports",
    ),
    *("profiles", "read_only", "restart", "security_opt", "stop_grace_period", "volumes"),
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def started_by(compose: dict[str, Any], *profiles: str) -> set[str]:
    """Return the services that `docker compose` starts with these profiles, and those without a profile."""
    services = compose["services"].items()
    return {
        name for name, service in services if not service.get("profiles") or set(service["profiles"]) & set(profiles)
    }


def volumes(compose: dict[str, Any]) -> list[str]:
    return [volume for service in compose["services"].values() for volume in service.get("volumes", ())]


def substituted(text: str) -> str:
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_compose_file_has_only_keys_that_compose_knows(compose: dict[str, Any]) -> None:
    assert {key for key in compose if not key.startswith("x-")} == {"services", "volumes"}
    for service in compose["services"].values():
        assert set(service) <= KNOWN_KEYS


@pytest.mark.parametrize(
    ("profiles", "services"),
    [
        (["ollama"], {"gateway", "ollama", "ollama-pull"}),
        (["ollama-cpu"], {"gateway", "ollama-cpu", "ollama-pull"}),
        (["vllm"], {"gateway", "vllm"}),
        (["ollama", "vllm"], {"gateway", "ollama", "ollama-pull", "vllm"}),
        (["vllm", "replicas"], {"gateway", "gateway-2", "redis", "vllm"}),
        (["vllm", "monitoring"], {"gateway", "vllm", "prometheus", "grafana"}),
        (["vllm", "monitoring", "monitoring-gpu"], {"gateway", "vllm", "prometheus", "grafana", "gpu-exporter"}),
    ],
)
def test_profile_starts_what_it_needs(compose: dict[str, Any], profiles: list[str], services: set[str]) -> None:
    assert started_by(compose, *profiles) == services


def test_service_of_a_profile_that_is_off_is_not_waited_for(compose: dict[str, Any]) -> None:
    awaited = [item for service in compose["services"].values() for item in service.get("depends_on", {}).items()]
    assert awaited
    for other, how in awaited:
        assert other in compose["services"]
        assert how["required"] is False


def test_only_the_gateways_and_grafana_have_a_published_port_on_loopback(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert {name: [substituted(port) for port in ports] for name, ports in published.items()} == {
        "gateway": ["127.0.0.1:8080:8080"],
        "gateway-2": ["127.0.0.1:8081:8080"],
        "grafana": ["127.0.0.1:3000:3000"],
    }


def test_every_engine_has_a_health_check(compose: dict[str, Any]) -> None:
    for name in ENGINES:
        assert compose["services"][name]["healthcheck"]["test"][0] == "CMD"


def test_gpus_are_reserved_where_they_are_used(compose: dict[str, Any]) -> None:
    for name in ("ollama", "vllm"):
        (device,) = compose["services"][name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]
    assert "deploy" not in compose["services"]["ollama-cpu"]


def test_named_volumes_are_declared(compose: dict[str, Any]) -> None:
    used = {volume.partition(":")[0] for volume in volumes(compose)}
    assert {name for name in used if not name.startswith(".")} == set(compose["volumes"])


def test_folders_that_are_mounted_exist_and_cannot_be_written(compose: dict[str, Any]) -> None:
    mounted = [volume for volume in volumes(compose) if volume.startswith(".")]
    assert len(mounted) == 3
    for volume in mounted:
        folder, _, mode = volume.split(":")
        assert (ROOT / folder).is_dir()
        assert mode == "ro"


def test_prometheus_scrapes_the_services_at_their_ports(compose: dict[str, Any]) -> None:
    document = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in document["scrape_configs"]}
    gateway_port = compose["services"]["gateway"]["environment"]["GATEWAY_METRICS_PORT"]
    assert jobs["gateway"]["static_configs"] == [{"targets": [f"gateway:{gateway_port}"]}]
    found = {job["names"][0]: job["port"] for name in ("vllm", "gpu") for job in jobs[name]["dns_sd_configs"]}
    assert found == {"vllm": 8000, "gpu-exporter": 9835}
    assert set(found) <= set(compose["services"])


def test_grafana_finds_its_dashboards_and_prometheus(compose: dict[str, Any]) -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((provisioning / "dashboards" / "gateway.yml").read_text())["providers"][0]
    grafana = compose["services"]["grafana"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "deploy" / "grafana" / "dashboards" / home.removeprefix(f"{provider['options']['path']}/")).is_file()


def test_variables_of_the_gateway_exist(compose: dict[str, Any]) -> None:
    given = set(compose["services"]["gateway"]["environment"])
    assert given <= set(VARIABLES)


def test_what_the_compose_file_asks_is_known() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    asked = set(re.findall(r"\$\{(\w+)", text))
    assert asked <= set(VARIABLES) | ASKED
    assert text.count("$") == len(re.findall(r"\$\{\w+:-[^}]*\}", text)), "each has a default, so that none is needed"


def test_engines_get_only_their_own_variables(compose: dict[str, Any]) -> None:
    for name in (*ENGINES, "ollama-pull"):
        assert set(compose["services"][name]["environment"]) <= FOREIGN_VARIABLES | {
            "OLLAMA_NUM_PARALLEL",
            "VLLM_API_KEY",
        }


def test_addresses_of_the_gateway_are_those_of_the_services(compose: dict[str, Any]) -> None:
    environment = compose["services"]["gateway"]["environment"]
    assert (
        environment["OLLAMA_BASE_URL"]
        == compose["services"]["ollama-pull"]["environment"]["OLLAMA_HOST"]
        == "http://ollama:11434"
    )
    assert compose["services"]["ollama-cpu"]["networks"]["default"]["aliases"] == ["ollama"]
    assert environment["VLLM_BASE_URL"] == "http://vllm:8000/v1"
    assert "--port=8000" in compose["services"]["vllm"]["command"]


def test_vllm_serves_the_model_that_the_gateway_asks_for(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services["vllm"]["command"][0] == services["gateway"]["environment"]["VLLM_MODEL"]
    assert services["ollama-pull"]["command"] == [services["gateway"]["environment"]["OLLAMA_MODEL"]]


def test_vllm_gets_no_flag_of_the_past(compose: dict[str, Any]) -> None:
    command = [substituted(word) for word in compose["services"]["vllm"]["command"]]
    assert command[0] not in ("serve", "vllm")
    flags = {word.partition("=")[0]: word.partition("=")[2] for word in command[1:]}
    gone = {"--disable-log-requests", "--swap-space", "--model", "--enable-chunked-prefill"}
    assert not gone & set(flags)
    assert flags["--limit-mm-per-prompt"] == '{"image": 4}', "JSON since vLLM 0.11"


def test_image_copies_what_is_there() -> None:
    copied = re.findall(r"^COPY (?!--from)(\S+) \S+$", DOCKERFILE, re.MULTILINE)
    assert copied == ["requirements/image.txt", "gateway"]
    admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert set(admitted) == set(copied)
    assert all((ROOT / source).exists() for source in copied)


def test_image_has_the_packages_of_every_extra_that_a_setting_can_ask_for() -> None:
    packages = (ROOT / "requirements" / "image.txt").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, needed in extras.items():
        if extra != "vllm":
            assert all(f"\n{re.split('[>=]', package)[0]}==" in packages for package in needed), extra


def test_image_sets_only_variables_that_exist() -> None:
    given = set(re.findall(r"\b(GATEWAY_\w+)=", DOCKERFILE))
    assert {"GATEWAY_HOST", "GATEWAY_STATE_FILE"} <= given <= set(VARIABLES)


def test_image_runs_as_nobody_and_installs_by_hash() -> None:
    assert "\nUSER gateway\n" in DOCKERFILE
    assert "--require-hashes" in DOCKERFILE
    assert "index-url" not in DOCKERFILE


def test_gateway_of_the_compose_file_writes_only_its_volume_and_has_no_capability(compose: dict[str, Any]) -> None:
    service = compose["services"]["gateway"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [volume.partition(":")[2] for volume in service["volumes"]] == ["/var/lib/gateway"]
    assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service)


def test_image_knows_when_the_gateway_is_ill() -> None:
    assert "/healthz" in DOCKERFILE.partition("HEALTHCHECK")[2]


@pytest.mark.parametrize(("value", "port"), [("9000", 9000), ("tcp://10.0.3.8:80", 8080), ("", 8080)])
def test_health_check_of_the_image_ignores_the_port_of_a_service(
    value: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes and Docker's links set GATEWAY_PORT for a service named `gateway`."""
    (command,) = re.findall(r"HEALTHCHECK .*\\\n\s+CMD (\[.*\])", DOCKERFILE)
    connection = MagicMock()
    connection.return_value.getresponse.return_value.status = 200
    monkeypatch.setenv("GATEWAY_PORT", value)
    monkeypatch.setattr(http.client, "HTTPConnection", connection)
    with pytest.raises(SystemExit) as ended:
        exec(json.loads(command)[2], {})
    assert ended.value.code is False
    assert connection.call_args.args == ("127.0.0.1", port)


def test_ci_runs_every_check_and_downloads_nothing_beside_the_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    steps = re.findall(r"^run (?!\.)([\w-]+)", script, re.MULTILINE)
    assert steps == ["prepare", "test", "check", "test-clients", "test-vllm"]
    assert " &\n" not in script
    assert "set -euo pipefail" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_ci_tests_every_python_that_the_package_names_and_the_images_is_the_newest_of_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", "\n".join(project["classifiers"]), re.MULTILINE)
    assert named == sorted(named, key=lambda version: int(version.partition(".")[2]))
    assert project["requires-python"] == f">={named[0]}"

    workflows = ROOT / ".github" / "workflows"
    jobs = yaml.safe_load((workflows / "ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == named

    assert re.findall(r"^FROM python:([\d.]+)-slim\b", DOCKERFILE, re.MULTILINE) == [named[-1]] * 2
    (packages,) = yaml.safe_load((workflows / "supply-chain.yml").read_text())["jobs"].values()
    audited = [step["with"]["python-version"] for step in packages["steps"] if "setup-python" in step.get("uses", "")]
    assert audited == [named[-1]], "the packages that are looked up are those that the image installs"
    for version in named:
        assert f"python{version}" in (ROOT / ".ci" / "run").read_text()
