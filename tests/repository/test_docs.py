"""What users are told keeps step with what there is."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from gateway import errors
from gateway.config import VARIABLES
from gateway.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path.relative_to(ROOT / "gateway") for path in (ROOT / "gateway").rglob("*.py") if path.name != "__init__.py"
)
# Tested as a whole, by the tests of what they make up.
PARTS = {
    "config": "test_config.py",
    "simulate": "simulate",
    "bench": "bench",
}
ELSEWHERE = {
    "__main__.py": "test_cli.py",
    "app.py": "test_api.py",
    "run.py": "test_cli.py",
    "chat_relay.py": "test_relay.py",
    "embedding_relay.py": "test_embeddings.py",
    "connection.py": "test_wire.py",
    "cycle.py": "test_front.py",
    "drain.py": "test_front.py",
    "framing.py": "test_front.py",
    "picture.py": "test_images.py",
    "forwarding.py": "test_fallback.py",
    "queues.py": "test_admission.py",
    "steering.py": "test_ops_rollout.py",
    "tickets.py": "test_admission.py",
    "surroundings.py": "test_relay.py",
    "tryout.py": "test_preflight.py",
    "backends/base.py": "backends/test_openai.py",
    "backends/backend.py": "test_relay.py",
}


def documents() -> str:
    """The pages for users: the README and docs/, without the decision records."""
    pages = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent.name != "adr"]
    return "\n".join(path.read_text() for path in [ROOT / "README.md", *pages])


def metric_names() -> list[str]:
    registry = CollectorRegistry()
    Metrics(registry, "0")
    ending = {"counter": "_total", "info": "_info"}
    return [family.name + ending.get(family.type, "") for family in registry.collect()]


def error_codes() -> list[str]:
    def below(kind: type[errors.GatewayError]) -> set[type[errors.GatewayError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    return sorted({kind.code for kind in below(errors.GatewayError) if kind.code})


@pytest.mark.parametrize("variable", VARIABLES)
def test_variable_is_in_the_example(variable: str) -> None:
    assert re.search(rf"^# {variable}=", (ROOT / ".env.example").read_text(), re.MULTILINE)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_module_has_its_tests(module: Path) -> None:
    part = (
        PARTS.get(module.parts[0]) or ELSEWHERE.get(module.as_posix()) or str(module.with_name(f"test_{module.name}"))
    )
    assert (ROOT / "tests" / part).exists()


def test_every_metric_is_documented() -> None:
    written = documents()
    assert [name for name in metric_names() if name not in written] == []


def test_every_error_code_is_documented() -> None:
    written = documents()
    assert [code for code in error_codes() if f"`{code}`" not in written] == []


def test_every_variable_is_documented() -> None:
    written = documents()
    assert [variable for variable in VARIABLES if variable not in written] == []
