"""`gateway verify` against every real engine through a gateway, and against the engine itself.

The stand-ins are checked in `tests/bench/verify`. Real engines have models of random weights: every
check has to hold for them, or say why it cannot.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import REAL_OLLAMA, REAL_VLLM, ollama_from_environment
from tests.e2e.engines import Engine
from tests.e2e.gateway import KEY, Gateway

CANNOT_BE_KNOWN = {"not_repeated", "cannot_recall", "cut_off", "ended_by_itself", "not_repeatable", "no_text_to_stop",
                   "model_writes_broken", "answer_too_short"}  # fmt: skip
"""Reasons for which a check may be skipped because of what a model wrote."""
ABOUT_THE_SERVER = {"open_server", "no_embedding_model", "no_tools", "no_single_model", "vllm_default_model",
                    "not_a_gateway", "context_unknown", "no_images"}  # fmt: skip
BARE_OLLAMA = {"too_long", "max_completion_tokens", "several_choices", "no_tool", "named_tool", "named_tool_streamed",
               "required_tool", "bad_image"}  # fmt: skip
"""Checks that an Ollama fails without a gateway; 0.24 does not refuse a bad image with 400."""
BARE_VLLM = {"named_tool", "named_tool_streamed", "required_tool"}
"""Checks that a vLLM 0.32 may fail without a gateway: it follows the schema of a forced call only with
`strict`, which few programs send."""


def verified(gateway: Gateway, folder: Path, url: str, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    done = gateway.command(folder, "verify", url, "--json", "--timeout", "240", *words)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, {check["check"]: check for check in json.loads(done.stdout)["checks"]}


@pytest.fixture(params=[REAL_VLLM, REAL_OLLAMA])
def real_engine(request: pytest.FixtureRequest) -> Engine:
    engine: Engine = request.getfixturevalue("vllms")[0] if request.param == "vllm" else ollama_from_environment()
    return engine


@pytest.fixture
def gateway(real_engine: Engine, tmp_path: Path) -> Any:
    document = {
        "llm_backend": real_engine.kind,
        "backends": {real_engine.kind: {"kind": real_engine.kind, "base_url": real_engine.url}},
        "tiers": {"standard": {"models": {real_engine.kind: real_engine.model}}},
    }
    with Gateway(tmp_path, {}, json.dumps(document)) as running:
        yield running


def test_nothing_fails_through_the_gateway_and_only_the_known_directly(
    gateway: Gateway, real_engine: Engine, tmp_path: Path
) -> None:
    status, checks = verified(gateway, tmp_path, gateway.url, "--api-key", KEY, "--seconds", "120")
    assert {name: check["text"] for name, check in checks.items() if check["status"] == "failed"} == {}
    assert status == 0
    skipped = {check["reason"] for check in checks.values() if check["status"] == "skipped"}
    assert skipped <= CANNOT_BE_KNOWN | ABOUT_THE_SERVER
    _, directly = verified(gateway, tmp_path, real_engine.url, "--model", real_engine.model)
    failed = {name: check["text"] for name, check in directly.items() if check["status"] == "failed"}
    assert set(failed) <= (BARE_OLLAMA if real_engine.kind == "ollama" else BARE_VLLM), failed
