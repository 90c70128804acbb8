"""Learned limits survive a restart."""

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


def restored(state: StateFile, in_force: dict[str, Backend], num_parallel: int | None) -> LearnedLimits:
    limits = LearnedLimits(state, in_force, num_parallel)
    limits.restore()
    return limits


def learn(limits: LearnedLimits, in_force: dict[str, Backend], limit: int) -> None:
    admission = in_force["ollama"].admission
    with Ticket(admission, admission.queue("llama", "text"), Claim()):
        in_force["ollama"].servers[0].models["llama"].limit = limit
    limits.save()


def limit_of(in_force: dict[str, Backend], model: str = "llama") -> int:
    return in_force["ollama"].admission.queue(model, "text").placements[0].limits[1].limit


async def test_learned_limit_outlives_a_restart(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state.json")
    limits = restored(state, in_force := backends(), None)
    learn(limits, in_force, 3)
    await state.close()
    restored(StateFile(tmp_path / "state.json"), in_force := backends(), None)
    assert (limit_of(in_force), limit_of(in_force, "llama"), limit_of(in_force, "other")) == (3, 3, 1)


async def test_changed_setting_takes_precedence_over_learned_limits(tmp_path: Path) -> None:
    state = StateFile(None)
    limits = restored(state, in_force := backends(), None)
    learn(limits, in_force, 3)
    restored(state, in_force := backends(2), 2)
    assert limit_of(in_force) == 2


async def test_learned_limit_of_an_unused_model_is_kept() -> None:
    state = StateFile(None)
    state.put(SECTION, {"num_parallel": None, "limits": {"ollama": {"ollama": {"old:latest": 4}}}})
    limits = restored(state, in_force := backends(), None)
    learn(limits, in_force, 2)
    assert state.get(SECTION)["limits"] == {"ollama": {"ollama": {"old:latest": 4, "llama": 2}}}


MALFORMED = {
    "nothing": None,
    "a number": 3,
    "a number for a backend": {"ollama": 3},
    "a number for a server": {"ollama": {"ollama": 3}},
    "a string for a model": {"ollama": {"ollama": {"llama": "3"}}},
    "an unknown backend": {"gone": {"x": {"y": 1}}},
}


@pytest.mark.parametrize("limits", MALFORMED.values(), ids=MALFORMED)
async def test_malformed_section_is_ignored(limits: Any) -> None:
    state = StateFile(None)
    state.put(SECTION, {"num_parallel": None, "limits": limits})
    restored(state, in_force := backends(), None)
    assert limit_of(in_force) == 1


async def test_limit_is_saved_when_a_backend_learns_it() -> None:
    state, in_force = StateFile(None), dict[str, Backend]()
    limits = LearnedLimits(state, in_force, None)
    settings = config.build({"tiers": {"standard": {"models": {"ollama": "llama"}}}})
    in_force["ollama"] = backend = Backend(settings.backends["ollama"], on_learned=limits.save)
    queue = backend.admission.queue("llama", "text")
    with Ticket(backend.admission, queue, Claim()) as first, Ticket(backend.admission, queue, Claim()) as trial:
        first.first_token()
        trial.first_token()
        await until(lambda: state.get(SECTION) is not None)
    assert state.get(SECTION)["limits"] == {"ollama": {"ollama": {"llama": 2}}}
