"""The progress of a switch on one GPU, as the commands print it."""

from typing import Any

from gateway.cli.gpu_progress import follow_switch
from gateway.cli.ops_client import OpsClient
from gateway.cli.tables import gpu_lines


def view(phase: str, to: str | None = "vllm", holder: str | None = None, **more: Any) -> dict[str, Any]:
    found = {
        "holder": holder,
        "phase": phase,
        "since": "2026-11-29T08:00:00Z",
        "seconds": 2.0,
        "from": None if to is None else "ollama",
        "to": to,
        "expected_seconds": 7.4,
        "running": 1,
        "waiting": 3,
        "rollback": {"to": "ollama", "seconds": 5.0, "basis": "measured"},
        "last": None,
    }
    return found | more


class Answers(OpsClient):
    """A client of a gateway that gives these answers."""

    def __init__(self, *views: dict[str, Any]) -> None:
        self._views = list(views)

    def request(self, *arguments: Any, **more: Any) -> dict[str, Any]:
        return {"tiers": {}, "gpu": self._views.pop(0)}


def followed(first: dict[str, Any], *views: dict[str, Any]) -> tuple[bool, list[str]]:
    lines: list[str] = []
    return follow_switch(Answers(*views), first, lambda seconds: None, lines.append), lines


def test_each_phase_is_one_line() -> None:
    done = view("ready", None, "vllm", last={"to": "vllm", "outcome": "done", "seconds": 9.0, "why": ""})
    is_done, lines = followed(view("draining"), view("draining"), view("freeing"), view("waking"), done)
    assert is_done
    assert [line.split()[0] for line in lines] == ["draining", "freeing", "waking", "vllm"]
    assert lines[0] == "draining from ollama to vllm for 2 s, about 7 s to go; 1 requests still run, 3 wait"


def test_a_switch_that_is_taken_back_is_told_with_its_reason() -> None:
    last = {"to": "vllm", "outcome": "failed", "seconds": 9.0, "why": "vllm did not come up"}
    is_done, lines = followed(view("waking"), view("waking", "ollama", last=last))
    assert not is_done
    assert lines[-1] == "the switch to vllm failed: vllm did not come up"


def test_without_a_switch_there_is_nothing_to_follow() -> None:
    assert followed(view("ready", None, "vllm")) == (True, [])


def test_an_engine_that_fails_ends_the_command() -> None:
    assert not followed(view("waking"), view("failed"))[0]


def test_status_tells_the_holder_the_last_failure_and_the_time_of_a_rollback() -> None:
    last = {"at": "2026-11-29T08:00:00Z", "to": "vllm", "outcome": "failed", "seconds": 9.0, "why": "no answer"}
    assert list(gpu_lines(view("ready", None, "vllm", last=last))) == [
        "GPU: vllm has had it since 2026-11-29 08:00:00",
        "GPU: the switch to vllm at 2026-11-29 08:00:00 failed: no answer",
        "GPU: a rollback would take about 5.0 s (measured)",
    ]
    nothing = {"to": "ollama", "seconds": 0.0, "basis": "none"}
    assert len(list(gpu_lines(view("ready", None, "ollama", rollback=nothing)))) == 1
    unknown = {"to": "ollama", "seconds": None, "basis": "unknown"}
    assert list(gpu_lines(view("waking", rollback=unknown)))[1] == "GPU: a rollback would take an unknown time"
