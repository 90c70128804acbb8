"""Learned limits outlive a restart."""

from pathlib import Path
from typing import Any

import pytest

from gateway import config
from gateway.admission.fair_queue import Claim
from gateway.admission.ticket import Ticket
from gateway.state_file import StateFile
from gateway.upstream.backend import Backend
from gateway.upstream.learned_limits import SECTION, LearnedLimits
from tests.fakes.running_gateway import until


def backends(num_parallel: int | None = None) -> dict[str, Backend]:
    settings = config.build({"tiers": {"standard": {"models": {"ollama": "llama"}}}})
    return {name: Backend(item, num_parallel) for name, item in settings.backends.items()}


def restored(state: StateFile, found: dict[str, Backend], num_parallel: int | None) -> LearnedLimits:
    limits = LearnedLimits(state, found, num_parallel)
    limits.restore()
    return limits


def learn(limits: LearnedLimits, found: dict[str, Backend], limit: int) -> None:
    admission = found["ollama"].admission
    with Ticket(admission, admission.queue("llama", "text"), Claim()):
        found["ollama"].servers[0].models["llama"].limit = limit
    limits.save()


def limit_of(found: dict[str, Backend], model: str = "llama") -> int:
    return found["ollama"].admission.queue(model, "text").placements[0].limits[1].limit


async def test_learned_limit_outlives_a_restart(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state.json")
    limits = restored(state, found := backends(), None)
    learn(limits, found, 3)
    await state.close()
    restored(StateFile(tmp_path / "state.json"), found := backends(), None)
    assert (limit_of(found), limit_of(found, "llama"), limit_of(found, "other")) == (3, 3, 1)


async def test_setting_that_has_changed_since_counts_more(tmp_path: Path) -> None:
    state = StateFile(None)
    limits = restored(state, found := backends(), None)
    learn(limits, found, 3)
    restored(state, found := backends(2), 2)
    assert limit_of(found) == 2


async def test_what_was_learned_of_a_model_that_is_not_used_now_is_kept() -> None:
    state = StateFile(None)
    state.put(SECTION, {"num_parallel": None, "limits": {"ollama": {"ollama": {"old:latest": 4}}}})
    limits = restored(state, found := backends(), None)
    learn(limits, found, 2)
    assert state.get(SECTION)["limits"] == {"ollama": {"ollama": {"old:latest": 4, "llama": 2}}}


WRONG = [
    None,
    3,
    {"ollama": 3},
    {"ollama": {"ollama": 3}},
    {"ollama": {"ollama": {"llama": "3"}}},
    {"gone": {"x": {"y": 1}}},
]


@pytest.mark.parametrize("limits", WRONG)
async def test_section_of_another_shape_is_no_harm(limits: Any) -> None:
    state = StateFile(None)
    state.put(SECTION, {"num_parallel": None, "limits": limits})
    restored(state, found := backends(), None)
    assert limit_of(found) == 1


async def test_limit_is_saved_when_a_backend_learns_it() -> None:
    state, found = StateFile(None), dict[str, Backend]()
    limits = LearnedLimits(state, found, None)
    settings = config.build({"tiers": {"standard": {"models": {"ollama": "llama"}}}})
    found["ollama"] = backend = Backend(settings.backends["ollama"], on_learned=limits.save)
    queue = backend.admission.queue("llama", "text")
    with Ticket(backend.admission, queue, Claim()) as first, Ticket(backend.admission, queue, Claim()) as trial:
        first.first_token()
        trial.first_token()
        await until(lambda: state.get(SECTION) is not None)
    assert state.get(SECTION)["limits"] == {"ollama": {"ollama": {"llama": 2}}}
