"""The preflight check of a switch of the engine on one GPU."""

from pathlib import Path
from typing import Any

import pytest

from gateway.rollout.gpu_times import NOTHING, UNKNOWN, Expected
from gateway.rollout.preflight.gpu_findings import shown
from tests.integration.one_gpu import OneGpu, one_gpu

pytestmark = pytest.mark.virtual_time


async def findings(setup: OneGpu, backend: str = "vllm") -> dict[str, dict[str, Any]]:
    answer = await setup.order("POST", f"/ops/preflight?backend={backend}")
    return {f"{item['what']} {item['backend']}": item for item in answer["findings"]} | {"": answer}


async def test_a_switch_that_works_breaks_nothing_and_wakes_nothing(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        found = await findings(setup)
        assert not found[""]["breaks"]
        assert found["gpu_free ollama"]["value"] == "unloads its models"
        assert found["gpu_free vllm"]["value"] == "sleeps"
        assert "takes an unknown time" in found["gpu_time vllm"]["words"]
        assert found["serves vllm"]["severity"] == "note"
        assert found["serves vllm"]["words"] == "vllm was not asked for 'Small': sleeps, not probed"
        assert setup.vllm.app.sleeper.is_sleeping  # type: ignore[union-attr]
        assert setup.was_never_on_both()


async def test_a_vllm_that_cannot_sleep_is_told_beforehand(tmp_path: Path) -> None:
    for options, words in (
        ({"dev_mode": False, "asleep": False}, "VLLM_SERVER_DEV_MODE=1"),
        ({"sleep_mode": False, "asleep": False}, "without --enable-sleep-mode"),
    ):
        folder = tmp_path / words.partition("=")[0].replace(" ", "-")
        folder.mkdir()
        async with one_gpu(folder, llm_backend="vllm", of_vllm=options) as setup:
            await setup.ended()
            found = await findings(setup, "ollama")
            assert found[""]["breaks"]
            assert words in found["gpu_free vllm"]["words"]
            assert "the switch would be taken back" in found["gpu_free vllm"]["words"]


async def test_an_engine_that_does_not_answer_and_a_missing_program_are_told(tmp_path: Path) -> None:
    commands = {"ollama": {"stop": "/nowhere/stop it", "start": ["/nowhere/start"]}}
    async with one_gpu(tmp_path, of=commands) as setup:
        await setup.ended()
        await setup.vllm.stop()
        found = await findings(setup)
        assert found["gpu_stop ollama"]["severity"] == "breaks"
        assert found["gpu_start ollama"]["severity"] == "breaks"
        assert "has no start command" in found["gpu_free vllm"]["words"]


async def test_what_would_be_refused_is_told(tmp_path: Path) -> None:
    tiers = {
        "standard": {"models": {"ollama": "small", "vllm": "Small"}},
        "local": {"models": {"ollama": "small"}, "backend": "ollama"},
    }
    embeddings = {"embed": {"backend": "ollama", "model": "embed"}}
    async with one_gpu(tmp_path, tiers=tiers, embeddings=embeddings) as setup:
        await setup.ended()
        answer = await setup.order("POST", "/ops/preflight?backend=vllm")
        refused = {(item["tier"], item["what"]) for item in answer["findings"] if item["value"] == "refused"}
        assert refused == {("local", "serves"), (None, "embeddings")}


def test_expected_times_are_shown_with_their_origin() -> None:
    assert [shown(each) for each in (NOTHING, UNKNOWN, Expected(2.0, "measured"))] == [
        "no time",
        "an unknown time",
        "about 2.0 s (measured)",
    ]
