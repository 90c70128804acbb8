"""Preflight check of a switch from an Ollama stand-in to every available vLLM.

The check must not report a capability of a real vLLM as missing.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.simulate import Model, Options
from tests.e2e.conftest import TEXT_MODEL, VISION_MODEL
from tests.e2e.engines import Engine, stand_in
from tests.e2e.gateway import Gateway

OLLAMA_MODEL = "qwen3-vl"


@pytest.fixture(scope="module")
def gateway(pair: tuple[Engine, Engine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with two tiers: one accepts images on both backends, the other only on Ollama."""
    vision, text = pair
    ollama = Options("ollama", (Model(OLLAMA_MODEL, family="qwen3vl", vision=True, tools=True),))
    with stand_in(ollama) as engine:
        document = {
            "llm_backend": "ollama",
            "backends": {
                "ollama": {"kind": "ollama", "base_url": engine.url},
                "vllm": {
                    "kind": "vllm",
                    "servers": [
                        {"base_url": vision.url, "models": [VISION_MODEL]},
                        {"base_url": text.url, "models": [TEXT_MODEL]},
                    ],
                },
            },
            "tiers": {
                "standard": {"models": {"ollama": OLLAMA_MODEL, "vllm": VISION_MODEL}},
                "text": {"models": {"ollama": OLLAMA_MODEL, "vllm": TEXT_MODEL}},
            },
        }
        with Gateway(tmp_path_factory.mktemp("gateway"), {}, json.dumps(document)) as gateway:
            yield gateway


def severities(body: dict[str, Any], tier: str) -> dict[str, str]:
    return {item["what"]: item["severity"] for item in body["findings"] if item["tier"] == tier}


def test_capabilities_are_fine_and_a_missing_one_breaks(gateway: Gateway, tmp_path: Path) -> None:
    checked = gateway.command(tmp_path, "verify", "--preflight", "vllm", "--seconds", "120", "--json")
    assert checked.returncode == 1, checked.stderr
    body = json.loads(checked.stdout)
    standard, text = severities(body, "standard"), severities(body, "text")
    able = (
        "serves",
        "streaming",
        "usage",
        "tools",
        "forced_tools",
        "structured_output",
        "vision",
        "parameters",
        "conversations",
    )
    assert {what: standard[what] for what in able} == dict.fromkeys(able, "fine"), body
    assert text["vision"] == "breaks", body
    assert {text[what] for what in ("serves", "streaming", "usage", "tools", "parameters")} == {"fine"}, body


@pytest.mark.timeout(180)  # three commands
def test_switch_of_a_breaking_tier_is_refused_and_of_another_succeeds(gateway: Gateway, tmp_path: Path) -> None:
    refused = gateway.command(tmp_path, "switch", "vllm")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "breaks: tier text: requests with images are refused" in refused.stderr
    done = gateway.command(tmp_path, "switch", "vllm", "--tier", "standard")
    assert done.returncode == 0, done.stderr
    assert gateway.command(tmp_path, "rollback").returncode == 0
