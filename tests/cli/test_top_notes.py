"""Lines below the tables of `gateway top`: a switch of the GPU, replicas, and what fits into 80 columns."""

from typing import Any

from gateway.cli.top_notes import MOST_LINES, notes

QUIET: dict[str, Any] = {
    "ready": {"status": "ready", "unserved_tiers": []},
    "backends": {},
    "rollout": {"history": [], "gpu": None, "shared": None},
    "errors": [],
    "processes": None,
    "replicas": None,
}
GPU = {
    "holder": None,
    "phase": "waking",
    "since": "2026-11-29T08:00:00Z",
    "seconds": 12.4,
    "from": "ollama",
    "to": "vllm",
    "expected_seconds": 29.6,
    "running": 2,
    "waiting": 5,
    "rollback": {"to": "ollama", "seconds": 5.4, "basis": "measured"},
    "last": None,
}
REPLICAS = {
    "replica": "one",
    "redis": "redis.internal:6379/0",
    "up": True,
    "since": 0.0,
    "reason": None,
    "sharing": 3,
    "replicas": 3,
    "limits": [
        {"name": "vllm http://10.0.0.5:8000 slots", "limit": 24, "share": 8, "running": 8},
        {"name": "ollama http://10.0.0.6:11434 slots", "limit": 4, "share": 2, "running": 0},
    ],
}


def lines(width: int = 80, **changes: Any) -> list[str]:
    status = {**QUIET, **changes}
    status["rollout"] = {**QUIET["rollout"], **changes.get("rollout", {})}
    return [note.text for note in notes(status, width)]


def styles(**changes: Any) -> set[str]:
    status = {**QUIET, **changes}
    status["rollout"] = {**QUIET["rollout"], **changes.get("rollout", {})}
    return {note.style for note in notes(status, 80)}


def test_a_quiet_gateway_has_no_lines() -> None:
    assert lines() == []


def test_a_switch_of_the_gpu_shows_phase_engines_times_and_requests_in_80_columns() -> None:
    shown = lines(rollout={"gpu": GPU})
    assert max(map(len, shown)) <= 80
    assert " ".join(" ".join(shown).split()) == (
        "GPU: waking from ollama to vllm for 12 s, about 30 s to go; 2 requests still run, 5 wait "
        "GPU: a rollback would take about 5.4 s (measured)"
    )
    assert styles(rollout={"gpu": GPU}) == {"yellow"}
    failed = GPU | {"phase": "failed", "from": None, "to": None, "expected_seconds": None}
    assert styles(rollout={"gpu": failed}) == {"bold red"}


def test_a_gpu_at_rest_shows_who_has_it() -> None:
    rests = GPU | {"holder": "vllm", "phase": "ready", "from": None, "to": None, "expected_seconds": None}
    assert lines(rollout={"gpu": rests})[0] == "GPU: vllm has had it since 2026-11-29 08:00:00"
    assert styles(rollout={"gpu": rests}) == {""}


def test_replicas_of_a_machine_are_shown_with_their_load_and_state() -> None:
    processes: list[dict[str, Any]] = [
        {"replica": number, "pid": number, "status": "ready", "running": {"a": 2, "b": 1}, "waiting": {"a": 4, "b": 0}}
        for number in range(1, 5)
    ]
    shown = lines(processes=processes)
    assert " ".join(" ".join(shown).split()) == (
        "replicas on this machine: #1 3 run 4 wait; #2 3 run 4 wait; #3 3 run 4 wait; #4 3 run 4 wait"
    )
    assert len(shown) == 2
    assert all(line.endswith(("wait", "wait;")) for line in shown), "a line ends within a replica"
    processes[1]["status"] = "draining"
    assert any("#2 draining 3 run 4 wait" in line for line in lines(processes=processes))
    assert styles(processes=processes) == {"yellow"}


def test_replicas_that_share_through_redis_show_the_fullest_limits_in_use() -> None:
    assert lines(replicas=REPLICAS) == [
        "replicas that share the limits: 3, through Redis at redis.internal:6379/0",
        "8 run here, share 8 of 24: vllm http://10.0.0.5:8000 slots",
    ]


def test_a_replica_that_is_alone_says_so_and_that_changes_reach_no_other() -> None:
    alone = REPLICAS | {"up": False, "reason": "ConnectionError", "sharing": 1}
    shown = lines(replicas=alone, rollout={"shared": False})
    assert "(ConnectionError); this replica goes on with 1/3 of each" in " ".join(" ".join(shown).split())
    assert any("do not know of each other's changes" in line for line in shown)
    assert max(map(len, shown)) <= 80
    assert "bold red" in styles(replicas=alone)


def test_no_text_takes_more_than_its_lines_or_the_width() -> None:
    long = {"phase": "draining", "from": "x" * 200, "to": "y" * 200}
    shown = lines(width=40, rollout={"gpu": GPU | long})
    assert max(map(len, shown)) <= 40
    assert len(shown) <= 2 * MOST_LINES
