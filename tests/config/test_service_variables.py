"""Variables of Kubernetes' Services and of Docker's links: never settings, never mistakes."""

import pytest

from gateway.config import ConfigError
from tests.config.harness import EXAMPLE, load, warned

pytestmark = pytest.mark.usefixtures("empty_environment")

SERVICES = (
    "gateway",
    "gateway-metrics",
    "gateway-ollama",
    "gateway-redis",
    "gateway-api-keys",
    "gateway--metrics",
    "gateway--backends--vllm",
    "gateway--no-such-key",
    "ollama",
    "ollama-num",
    "vllm",
    "vllm-api",
    "llm",
    "llm-backend",
)


def variables_of(service: str, host: str = "10.0.3.8") -> dict[str, str]:
    """Return the variables that Kubernetes sets for a Service with the ports 9090 and 53/UDP."""
    name = service.upper().replace("-", "_")
    url_host = f"[{host}]" if ":" in host else host
    variables = {
        f"{name}_SERVICE_HOST": host,
        f"{name}_SERVICE_PORT": "9090",
        f"{name}_SERVICE_PORT_HTTP": "9090",
        f"{name}_SERVICE_PORT_OPENAI_API": "9090",
        f"{name}_PORT": f"tcp://{url_host}:9090",
    }
    for port, protocol in (("9090", "tcp"), ("53", "udp"), ("132", "sctp")):
        base = f"{name}_PORT_{port}_{protocol.upper()}"
        variables |= {
            base: f"{protocol}://{url_host}:{port}",
            f"{base}_PROTO": protocol,
            f"{base}_PORT": port,
            f"{base}_ADDR": host,
        }
    return variables


@pytest.mark.parametrize("host", ["10.0.3.8", "fd00::3:8"])
@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("text", [None, EXAMPLE])
def test_variables_of_a_service_are_ignored_with_one_line(service: str, host: str, text: str | None) -> None:
    variables = variables_of(service, host)
    settings = load(text, variables)
    plain = load(text)
    assert settings.model_dump(exclude={"sources"}) == plain.model_dump(exclude={"sources"})
    assert warned(settings) == warned(plain)
    (line,) = set(settings.sources) - set(plain.sources)
    assert line == (
        "environment: ignored, since Kubernetes or Docker set them for services of such names: "
        + ", ".join(sorted(variables))
    )


def test_name_of_a_docker_link_is_ignored() -> None:
    assert warned(load(environ={"GATEWAY_NAME": "/web/gateway"})) == []
    (line,) = warned(load(environ={"GATEWAY_NAME": "web"}))
    assert line.startswith("GATEWAY_NAME: ignored: unknown setting")


def test_settings_beside_the_variables_of_services_count() -> None:
    environ = {"GATEWAY_PORT": "9000", "GATEWAY_METRICS_PORT": "9001", "GATEWAY__BACKENDS__VLLM__MAX_QUEUE": "7"}
    settings = load(environ=variables_of("gateway") | variables_of("gateway-metrics") | environ)
    assert (settings.port, settings.metrics_port, settings.backends["vllm"].limits.max_queue) == (9000, 9001, 7)
    assert settings.sources[1].startswith("environment: GATEWAY_METRICS_PORT, GATEWAY_PORT, GATEWAY__BACKENDS")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GATEWAY_METRICS_PORT", "http://10.0.3.8:9090"),
        ("GATEWAY__METRICS_SERVICE_HOST", '{"a": 1}'),
        ("GATEWAY__METRICS_PORT", "tcp:9090"),
        ("GATEWAY__NO_SUCH_KEY", "tcp://10.0.3.8:9090"),
    ],
)
def test_other_values_are_still_mistakes(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        load(environ={variable: value})


def test_names_with_the_form_of_a_service_can_be_settings() -> None:
    """A backend may be named `a-service-host`; its key is not an address."""
    settings = load(
        "backends: {a-service-host: {kind: vllm}}\ntiers: {t: {models: {a-service-host: x}}}",
        {"GATEWAY__TIERS__T__MODELS__A_SERVICE_HOST": "qwen3"},
    )
    assert settings.tiers["t"].models == {"a-service-host": "qwen3"}
