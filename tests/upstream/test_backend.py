"""A backend: its servers and queues, learned limits, and changes of its settings.

Covers: gateway/upstream/kinds.py
"""

import json

import pytest

from gateway.admission.queues import Queue
from gateway.chat.embedding import Embedding
from gateway.config import LimitOverrides
from gateway.engines.engine import ModelFacts
from gateway.upstream.backend import Backend
from tests.fakes.chats import chat
from tests.upstream.offline_backend import MODEL, backend, eject, ticket

# Servers


@pytest.mark.parametrize(("servers", "names"), [(1, ["here"]), (2, ["here#1", "here#2"])], ids=["one", "two"])
def test_servers_are_numbered_if_there_are_several(servers: int, names: list[str]) -> None:
    assert [server.name for server in backend(servers=servers).servers] == names


def test_settings_headers_and_the_key_are_sent_with_every_request() -> None:
    here = backend(api_key="secret", headers={"X-Extra": "1"})
    assert here.headers() == [("x-extra", "1"), ("Authorization", "Bearer secret")]
    head = here.servers[0].chat_head(b"", b"me")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:1\r\n")
    assert b"\r\nx-extra: 1\r\nAuthorization: Bearer secret\r\n" in head


def test_smallest_context_length_of_the_servers_counts() -> None:
    here = backend()
    assert here.context_length(MODEL) is None
    here.servers[0].update_models({MODEL: ModelFacts(context_length=2048)})
    assert here.context_length(MODEL) == 2048
    here.servers[1].update_models({MODEL: ModelFacts(context_length=512)})
    assert here.context_length(MODEL) == 512


@pytest.mark.parametrize("lengths", [(512, 2048, 1024), (2048, 512, 1024), (2048, 1024, 512)])
def test_smallest_context_length_counts_whichever_server_reports_it(lengths: tuple[int, ...]) -> None:
    here = backend(servers=4)
    for server, length in zip(here.servers, lengths, strict=False):  # the last server reports none
        server.update_models({MODEL: ModelFacts(context_length=length)})
    here.servers[3].update_models({MODEL: ModelFacts()})
    assert here.context_length(MODEL) == 512
    assert here.context_length("another") is None


@pytest.mark.parametrize("number", [0, 1, 2])
def test_capability_that_any_server_lacks_is_lacking(number: int) -> None:
    here = backend(servers=3)
    for index, server in enumerate(here.servers):
        capabilities = frozenset({"vision", "tools"} if index != number else {"tools"})
        server.update_models({MODEL: ModelFacts(capabilities=capabilities)})
    assert (here.lacks(MODEL, "vision"), here.lacks(MODEL, "tools")) == (True, False)


def test_model_lacks_a_capability_if_one_server_says_so() -> None:
    here = backend()
    assert not here.lacks(MODEL, "vision")
    here.servers[0].update_models({MODEL: ModelFacts(capabilities=frozenset({"vision"}))})
    assert not here.lacks(MODEL, "vision")
    here.servers[1].update_models({MODEL: ModelFacts(capabilities=frozenset())})
    assert here.lacks(MODEL, "vision")


# Queues and limits


def queue_of(backend: Backend, lane: str, overrides: LimitOverrides | None, tier: str = "standard") -> Queue:
    return backend.queues([lane], tier, MODEL, overrides)[lane]


@pytest.mark.parametrize(
    "overrides",
    [None, LimitOverrides(), LimitOverrides(idle_timeout=1.0)],
    ids=["none", "empty", "of another kind"],
)
def test_tiers_without_queue_limits_share_a_queue(overrides: LimitOverrides | None) -> None:
    here = backend()
    assert queue_of(here, "text", overrides, "one") is queue_of(here, "text", None, "two")


@pytest.mark.parametrize(
    ("overrides", "limits"),
    [
        (LimitOverrides(max_concurrency=3), [8, 3, 5]),
        (LimitOverrides(model_concurrency=2), [8, 2]),
        (LimitOverrides(concurrency=4, model_concurrency=2), [8, 4]),
        (LimitOverrides(model_concurrency="auto", max_queue=1), [8, 5]),
    ],
    ids=["max_concurrency", "model_concurrency", "concurrency", "auto"],
)
def test_limits_of_a_tier_add_to_those_of_the_server_or_replace_the_others(
    overrides: LimitOverrides, limits: list[int]
) -> None:
    """In the text lane these are: the server's, the tier's own for the server, and the model's."""
    here = backend(max_concurrency=8, model_concurrency=5)
    placement = queue_of(here, "text", overrides).placements[0]
    assert [limit.limit for limit in placement.limits] == limits


def test_vision_limits_of_a_tier_apply_to_the_vision_lane_only() -> None:
    here = backend()
    overrides = LimitOverrides(vision_concurrency=1, vision_max_queue=2, vision_queue_timeout=3.0, queue_timeout=4.0)
    text, vision = queue_of(here, "text", overrides), queue_of(here, "vision", overrides)
    assert (text.queue_timeout, vision.queue_timeout) == (4.0, 3.0)
    assert vision.room.limit == 2
    assert vision.placements[0].limits[-1].limit == 1
    assert text.room is queue_of(here, "text", None).room


def test_learned_limits_are_kept_by_server_and_model_and_recalled_as_guesses() -> None:
    here = backend(kind="ollama")
    queue_of(here, "text", None)
    here.servers[1].models[MODEL].limit = 3
    learned = here.learned()
    assert learned == {"here#1": {MODEL: 1}, "here#2": {MODEL: 3}}
    again = backend(kind="ollama")
    again.recall(learned)
    assert [placement.limits[1].limit for placement in queue_of(again, "text", None).placements] == [1, 3]
    assert again.learned() == learned


def test_limit_that_the_settings_fix_is_not_learned() -> None:
    here = backend(kind="ollama", model_concurrency=2)
    queue_of(here, "text", None)
    assert here.learned() == {"here#1": {}, "here#2": {}}


# Servers that get no requests


def test_server_that_answers_wrongly_is_excluded_while_another_is_well() -> None:
    here = backend()
    first, second = here.servers
    first.up = False
    here.refresh()
    assert (first.is_excluded, second.is_excluded, here.is_restrained) == (True, False, True)
    second.up = False
    here.refresh()
    assert (first.is_excluded, second.is_excluded) == (False, False)


# Change of settings


async def test_change_of_settings_keeps_an_ejection() -> None:
    here = backend(servers=1)
    detector = eject(here)
    here.change(backend(servers=1, max_concurrency=2).settings)
    assert here.servers[0].ejections == [detector]
    here.close()


async def test_change_applies_to_the_same_servers_and_admits_queued_requests() -> None:
    here = backend(servers=1, max_concurrency=1)
    with ticket(here), ticket(here) as waiting:
        assert waiting.is_queued
        here.change(backend(servers=1, max_concurrency=2, connect_timeout=9).settings)
        assert waiting.placement is not None
        assert here.servers[0].pool.connect_timeout == 9


async def test_change_reaches_chats_embeddings_and_loads() -> None:
    here = backend(kind="ollama", servers=1, keep_alive="1m", num_ctx=1024)
    here.change(backend(kind="ollama", servers=1, keep_alive="9m", num_ctx=2048).settings)
    assert here.loading is not None
    found = {
        "chat": here.engine.render(chat(), MODEL, ModelFacts(), True),
        "embedding": here.embedder.render(Embedding(model=MODEL, input="text"), MODEL),
        "load": here.loading.body(MODEL, False),
    }
    sent = {name: json.loads(body) for name, body in found.items()}
    assert {name: (body["keep_alive"], body["options"]["num_ctx"]) for name, body in sent.items()} == dict.fromkeys(
        found, ("9m", 2048)
    )


# The choice among servers


@pytest.mark.parametrize(
    ("kind", "servers", "keys", "has_affinity"),
    [
        ("vllm", 2, {}, True),
        ("openai", 2, {"balance": "affinity"}, True),
        ("vllm", 2, {"balance": "least_busy"}, False),
        ("vllm", 1, {"balance": "affinity"}, False),
        ("ollama", 2, {}, False),
    ],
)
def test_affinity_is_for_several_servers_with_a_prefix_cache(
    kind: str, servers: int, keys: dict[str, str], has_affinity: bool
) -> None:
    assert (backend(kind=kind, servers=servers, **keys).admission.affinity is not None) == has_affinity


async def test_change_of_balance_takes_effect_at_run_time() -> None:
    here = backend(balance="least_busy")
    here.change(backend().settings)
    affinity = here.admission.affinity
    assert affinity is not None
    here.change(backend(max_queue=3).settings)
    assert here.admission.affinity is affinity
    here.change(backend(balance="least_busy").settings)
    assert here.admission.affinity is None


def test_servers_have_the_same_seeds_in_every_replica() -> None:
    seeds = [[server.prefixes.seed for server in backend().servers] for _ in range(2)]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2
