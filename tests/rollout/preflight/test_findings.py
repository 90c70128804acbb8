"""Findings: what breaks, what clients notice, what a rollback costs, what is known of the GPU."""

from math import inf
from typing import Any

import pytest

from gateway.rollout.preflight.findings import (
    CAPABILITIES,
    BackendFacts,
    TierSide,
    compare,
    rollback_finding,
    shared_gpu,
)
from gateway.rollout.preflight.gpu_memory import GpuMemory, LoadedModel
from gateway.rollout.preflight.probes import YES, Trait, Traits

ALL: Traits = {"answers": YES, **{capability.what: YES for capability in CAPABILITIES}}
REFUSED, UNKNOWN = Trait(False, "refused"), Trait(None, "not reported")


def side(name: str = "vllm", **changes: Any) -> TierSide:
    traits = ALL | changes.pop("traits", {})
    return TierSide(**{"backend": name, "kind": name, "model": "m", "traits": traits, "context": 4096, **changes})


def severities(here: TierSide, there: TierSide | None) -> dict[str, str]:
    return {finding.what: finding.severity for finding in compare("t", here, there)}


def test_equal_sides_have_only_fine_findings() -> None:
    assert set(severities(side(), side("ollama")).values()) == {"fine"}


@pytest.mark.parametrize("what", ["vision", "tools", "forced_tools", "conversations"])
def test_missing_capability_breaks_only_if_the_other_side_has_it(what: str) -> None:
    here = side(traits={what: REFUSED})
    assert severities(here, side("ollama"))[what] == "breaks"
    assert severities(here, side("ollama", traits={what: REFUSED}))[what] == "fine"
    assert severities(here, side("ollama", traits={what: UNKNOWN}))[what] == "notices"
    assert severities(here, None)[what] == "notices"
    assert severities(side(traits={what: UNKNOWN}), side("ollama"))[what] == "note"


@pytest.mark.parametrize("what", ["usage", "structured_output", "parameters"])
def test_capability_that_programs_can_do_without_is_noticed(what: str) -> None:
    assert severities(side(traits={what: REFUSED}), side("ollama"))[what] == "notices"


def test_forced_tool_choice_that_is_not_followed_is_only_noticed() -> None:
    found = list(compare("t", side(traits={"forced_tools": Trait(False, "not followed")}), side("ollama")))
    assert [(finding.severity, finding.words) for finding in found if finding.what == "forced_tools"] == [
        ("notices", "a forced tool choice is not followed")
    ]


def test_reasoning_in_the_text_is_noticed_whatever_the_other_side_does() -> None:
    leaks = side(traits={"reasoning": Trait(False, "in the answer's text")})
    for there in (YES, Trait(False, "no"), UNKNOWN):
        assert severities(leaks, side("ollama", traits={"reasoning": there}))["reasoning"] == "notices"
    none = side(traits={"reasoning": Trait(None, "none seen")})
    assert severities(none, side("ollama"))["reasoning"] == "notices"
    assert severities(none, side("ollama", traits={"reasoning": Trait(False, "no")}))["reasoning"] == "fine"


def test_smaller_context_is_noticed_if_both_are_known() -> None:
    small, large = side(context=2048), side("ollama", context=4096)
    assert severities(small, large)["context"] == "notices"
    assert severities(large, small)["context"] == "fine"
    assert severities(small, side("ollama", is_context_sure=False))["context"] == "note"
    assert severities(side(context=None), large)["context"] == "note"
    assert severities(small, side("ollama", context=None))["context"] == "fine"
    assert severities(small, None)["context"] == "fine"


def test_side_that_cannot_serve_has_one_finding() -> None:
    assert severities(side(fault="asleep"), side("ollama")) == {"serves": "breaks"}
    assert severities(side(traits={"answers": REFUSED}), None)["serves"] == "breaks"
    busy = severities(TierSide("vllm", "vllm", "m", {"answers": Trait(None, "busy")}), side("ollama"))
    assert busy == {"serves": "note", "context": "note"}


def test_capability_that_was_not_reached_is_a_note() -> None:
    traits = {"answers": YES, "streaming": YES, "usage": YES, "unfinished": Trait(False, "no end in time")}
    found = severities(TierSide("vllm", "vllm", "m", traits, context=4096), side("ollama"))
    assert set(found.values()) == {"fine", "note"}


# Rollback


def ollama(*loaded: LoadedModel, **changes: Any) -> BackendFacts:
    return BackendFacts(
        **{
            "name": "ollama",
            "kind": "ollama",
            "hosts": frozenset({"a"}),
            "is_up": True,
            "keeps_loaded": False,
            "memory": GpuMemory(list(loaded)),
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("seconds", "changes", "severity", "value"),
    [
        (0, {}, "note", "not loaded"),
        (0, {"keeps_loaded": True}, "note", "not loaded"),
        (90, {}, "note", "loaded for 90 s"),
        (290, {}, "note", "loaded for 5 min"),
        (290, {"keeps_loaded": True}, "fine", "stays loaded"),
        (inf, {}, "fine", "stays loaded"),
        (None, {}, "note", "unknown"),
        (None, {"is_up": False}, "note", "down"),
        (None, {"kind": "vllm"}, "fine", "up"),
    ],
    ids=[
        "not-loaded",
        "not-loaded-but-kept",
        "soon-unloaded",
        "later-unloaded",
        "kept-by-the-settings",
        "never-unloaded",
        "unknown",
        "down",
        "vllm",
    ],
)
def test_rollback_finding_depends_on_what_is_loaded(
    seconds: float | None, changes: dict[str, Any], severity: str, value: str
) -> None:
    found = rollback_finding("t", "m", ollama(**changes), seconds)
    assert (found.severity, found.value) == (severity, value)
    assert bool(found.words) is (severity != "fine")


def test_rollback_without_a_model_is_noted() -> None:
    assert rollback_finding("t", None, ollama(), None).value == "no model"


# The GPU


def vllm(share: float | None = 0.9, **changes: Any) -> BackendFacts:
    return BackendFacts(
        **{
            "name": "vllm",
            "kind": "vllm",
            "hosts": frozenset({"a", "b"}),
            "is_up": True,
            "keeps_loaded": False,
            "memory": GpuMemory(share=share),
            **changes,
        }
    )


def loaded(in_gpu: int, size: int = 6_000_000_000) -> LoadedModel:
    return LoadedModel("qwen3:8b", size, in_gpu, 4096, 60.0)


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        (
            ollama(loaded(6_000_000_000)),
            vllm(),
            "holds 6.0 GB of GPU memory and vllm may take 90%: together they need 60 GB or more",
        ),
        (ollama(loaded(6_000_000_000)), vllm(None), "both fit now"),
        (ollama(loaded(1_500_000_000)), vllm(), "only 25% of 'qwen3:8b'"),
        (ollama(loaded(0)), vllm(), "main memory"),
        (ollama(), vllm(), "It is unknown"),
        (ollama(memory=GpuMemory()), vllm(None), "an unknown part"),
        (ollama(loaded(6_000_000_000)), vllm(is_up=False), "may be unable to start while ollama holds 6.0 GB"),
        (ollama(is_up=False), vllm(), "stop vllm and start ollama"),
    ],
    ids=[
        "both-run",
        "share-unknown",
        "partly-on-the-gpu",
        "main-memory",
        "nothing-loaded",
        "nothing-known",
        "vllm-down",
        "ollama-down",
    ],
)
def test_shared_gpu_is_described_as_far_as_it_is_known(there: BackendFacts, here: BackendFacts, words: str) -> None:
    for pair in ((here, there), (there, here)):
        found = shared_gpu(*pair)
        assert found is not None
        assert words in found.words


def test_other_hosts_are_fine_and_other_kinds_have_no_finding() -> None:
    apart = shared_gpu(vllm(hosts=frozenset({"c"})), ollama())
    assert apart is not None
    assert apart.severity == "fine"
    assert shared_gpu(vllm(), vllm()) is None
    assert shared_gpu(vllm(), ollama(kind="openai")) is None
