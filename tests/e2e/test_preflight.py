"""The check before a switch, against every vLLM at hand beside an Ollama's stand-in: what a real one takes is not taken for refused."""

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
def both(pair: tuple[Engine, Engine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A tier whose model has images on both sides, and one whose model on vLLM has none."""
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


def test_what_the_engine_can_is_found_and_what_it_cannot_breaks(both: Gateway, tmp_path: Path) -> None:
    told = both.command(tmp_path, "verify", "--preflight", "vllm", "--seconds", "120", "--json")
    assert told.returncode == 1, told.stderr
    body = json.loads(told.stdout)
    standard, text = severities(body, "standard"), severities(body, "text")
    able = ("serves", "streaming", "usage", "tools", "forced_tools", "structured_output", "vision", "parameters")
    assert {what: standard[what] for what in able} == dict.fromkeys(able, "fine"), body
    assert text["vision"] == "breaks", body
    assert {text[what] for what in ("serves", "streaming", "usage", "tools", "parameters")} == {"fine"}, body


def test_switch_of_the_tier_that_would_break_is_refused_and_of_the_other_is_done(both: Gateway, tmp_path: Path) -> None:
    refused = both.command(tmp_path, "switch", "vllm")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "breaks: tier text: requests with images are refused" in refused.stderr
    done = both.command(tmp_path, "switch", "vllm", "--tier", "standard")
    assert done.returncode == 0, done.stderr
    assert both.command(tmp_path, "rollback").returncode == 0
