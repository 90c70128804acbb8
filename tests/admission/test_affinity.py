"""Affinity: conversations stay where their cache is, as long as that costs less than to move."""

from collections import Counter, deque

import pytest

from gateway.admission.affinity import LOAD, Affinity
from gateway.admission.server_slots import ServerSlots
from gateway.chat.message import Message
from gateway.chat.prompt_blocks import PromptBlocks, prompt_blocks
from gateway.chat.request import Chat
from tests.fakes.admission import Request, Server, Setup, setup


def fleet(number: int = 4, slots: int = 100) -> Setup:
    servers = tuple(Server("m") for _ in range(number))
    for seed, server in enumerate(servers):
        server.prefixes.seed = seed
    return setup(*servers, affinity=Affinity(), slots=slots, model=slots)


@pytest.fixture(autouse=True)
def _all_worth_caching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.chat.prompt_blocks.WORTH_CACHING", 0)


def turns(*texts: str, system: str = "") -> PromptBlocks:
    """Return the blocks of a conversation: texts of the user and of the assistant in turn."""
    messages = [Message("system", system)] if system else []
    messages += [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
    found = prompt_blocks(Chat(model="m", messages=messages), "m")
    assert found is not None
    return found


def server_of(request: Request) -> ServerSlots:
    assert request.placement is not None
    return request.placement.server


def serve(gateway: Setup, prompt: PromptBlocks) -> ServerSlots:
    """Return the server that served a request, which has ended."""
    request = gateway.arrive(prompt=prompt)
    server = server_of(request)
    gateway.admission.first_token(request)
    gateway.leave(request)
    return server


def counts(gateway: Setup) -> dict[str, int]:
    assert gateway.admission.affinity is not None
    return gateway.admission.affinity.take_counts()


def test_turns_of_a_conversation_stay_on_their_server() -> None:
    gateway = fleet()
    for number in range(20):
        question = f"{number}" + "q" * 3000
        first = serve(gateway, turns(question))
        assert serve(gateway, turns(question, "answer", "next")) is first
        assert serve(gateway, turns(question, "answer", "next", "answer", "last")) is first
    assert counts(gateway) == {"kept": 40, "moved": 0, "new": 20}


def test_conversations_spread_over_the_servers() -> None:
    gateway = fleet()
    given = Counter(id(serve(gateway, turns(f"{number}" + "q" * 3000))) for number in range(400))
    assert len(given) == 4
    assert max(given.values()) < 150


def test_common_system_prompt_goes_where_it_is_cached() -> None:
    gateway = fleet()
    served = {id(serve(gateway, turns(f"question {number}", system="s" * 8000))) for number in range(20)}
    assert len(served) == 1


def test_prompt_that_everyone_sends_spreads_when_its_server_is_busy() -> None:
    gateway = fleet()
    running = [gateway.arrive(prompt=turns(f"question {number}", system="s" * 8000)) for number in range(80)]
    load = Counter(id(server_of(request)) for request in running)
    assert len(load) == 4
    assert max(load.values()) <= 1.75 * 80 / 4


def test_conversation_moves_when_waiting_costs_more_than_the_cache_saves() -> None:
    gateway = fleet(2)
    first = serve(gateway, turns("q" * 3000))
    first.slots.count += 20
    moved = serve(gateway, turns("q" * 3000, "a", "b"))
    assert moved is not first
    assert counts(gateway)["moved"] == 1


def test_prompt_on_its_way_to_the_first_token_keeps_others_away_until_then() -> None:
    gateway = fleet(2)
    long = gateway.arrive(prompt=turns("x" * 100_000))
    busy = server_of(long)
    assert busy.prefixes.pending == 100_000
    others = [serve(gateway, turns(f"{number}")) for number in range(10)]
    assert busy not in others
    gateway.admission.first_token(long)
    assert busy.prefixes.pending == 0
    gateway.leave(long)
    assert busy.prefixes.pending == 0


def test_request_that_ends_without_a_token_is_no_longer_pending() -> None:
    gateway = fleet(2)
    request = gateway.arrive(prompt=turns("x" * 5000))
    server = server_of(request)
    gateway.leave(request)
    assert server.prefixes.pending == 0


def test_server_that_fails_its_requests_does_not_attract_them() -> None:
    gateway = fleet(2)
    failed = gateway.arrive(prompt=turns("x" * 5000))
    server = server_of(failed)
    gateway.leave(failed)
    assert server.prefixes.known_blocks(turns("x" * 5000)) == 0
    plain = gateway.arrive(prompt=turns("x" * 5000))
    plain.is_served = True  # an answer that was not streamed has no first token
    served_by = server_of(plain)
    gateway.leave(plain)
    assert served_by.prefixes.known_blocks(turns("x" * 5000)) == len(turns("x" * 5000).hashes)


def test_conversation_whose_server_is_full_or_down_goes_elsewhere() -> None:
    gateway = fleet(2, slots=1)
    prompt = turns("q" * 5000)
    running = gateway.arrive(prompt=prompt)
    other = gateway.arrive(prompt=turns("q" * 5000, "a", "b"))
    assert server_of(other) is not server_of(running)


def test_restarted_server_counts_as_cold() -> None:
    gateway = fleet(2)
    first = serve(gateway, turns("q" * 5000))
    first.prefixes.clear()
    assert first.prefixes.known_blocks(turns("q" * 5000)) == 0
    assert all(goes_home(gateway, continued(number)) for number in range(12) if at_home(gateway, number) is not first)
    assert not any(goes_home(gateway, continued(number)) for number in range(12) if at_home(gateway, number) is first)


def at_home(gateway: Setup, number: int) -> Server:
    return gateway.servers[home(gateway, continued(number))]


@pytest.mark.parametrize("shared", ["", "s" * 8000])
def test_replicas_that_share_nothing_agree_on_the_home_of_a_conversation(shared: str) -> None:
    one, other = fleet(), fleet()
    for number in range(12):
        question = f"{number}" + "q" * 3000
        if shared:  # the other replica knows the system prompt from someone else
            serve(other, turns("hello", system=shared))
        began = one.servers.index(server_of(one.arrive(prompt=turns(question, system=shared))))  # type: ignore[arg-type]
        if not shared or began == home(one, turns(question, system=shared)):
            continued = serve(other, turns(question, "answer", "next", system=shared))
            assert other.servers.index(continued) == began  # type: ignore[arg-type]
        for request in one.requests:
            one.leave(request)


def fill(gateway: Setup) -> None:
    for number, server in enumerate(gateway.servers):
        server.prefixes.resize(10_000)
        server.prefixes.add(turns(f"{number}" + "q" * 50_000))


def goes_home(gateway: Setup, prompt: PromptBlocks) -> bool:
    """Return whether a prompt goes home although three more requests run there than elsewhere."""
    expected = gateway.servers[home(gateway, prompt)]
    expected.slots.count += 3
    served = serve(gateway, prompt)
    expected.slots.count -= 3
    return served is expected


def continued(number: int, turn: int = 1) -> PromptBlocks:
    more = [text for count in range(turn) for text in ("answer", f"question {count}")]
    return turns(f"{number}" + "q" * 3000, *more)


def test_unseen_conversation_goes_home_only_until_what_was_there_before_a_restart_is_pushed_out() -> None:
    """Later it is one of a client that makes up the answers, or leaves out the oldest messages."""
    gateway = fleet(2)
    assert all(goes_home(gateway, continued(number)) for number in range(5))
    fill(gateway)
    assert not any(goes_home(gateway, continued(number)) for number in range(100, 105))


def test_unseen_conversation_goes_home_if_others_serve_turns_of_known_ones() -> None:
    gateway = fleet(2)
    for number in range(60):
        serve(gateway, continued(number))
        serve(gateway, continued(number, turn=2 if number % 2 else 5))
    fill(gateway)
    assert all(goes_home(gateway, continued(number)) for number in range(100, 105))


def test_unseen_conversation_goes_home_if_there_are_other_replicas() -> None:
    gateway = fleet(2)
    fill(gateway)
    assert gateway.admission.affinity is not None
    gateway.admission.affinity.placed = deque()
    assert all(goes_home(gateway, continued(number)) for number in range(100, 105))


def test_turns_that_all_came_here_were_not_served_elsewhere() -> None:
    gateway = fleet(2)
    for number in range(40):
        for turn in range(1, 9):
            serve(gateway, continued(number, turn))
    fill(gateway)
    assert not any(goes_home(gateway, continued(number)) for number in range(100, 105))


def home(gateway: Setup, prompt: PromptBlocks) -> int:
    seeds = [hash((prompt.home, server.prefixes.seed)) for server in gateway.servers]
    return seeds.index(max(seeds))


def test_servers_that_cost_the_same_take_turns() -> None:
    gateway = setup(*(Server("m") for _ in range(4)), slots=100, model=100)
    served = [gateway.servers.index(serve(gateway, None)) for _ in range(12)]  # type: ignore[arg-type]
    assert Counter(served) == {0: 3, 1: 3, 2: 3, 3: 3}


def test_load_of_one_request_is_worth_some_of_the_prompt() -> None:
    gateway = fleet(2)
    first = serve(gateway, turns("q" * 100))
    first.slots.count += 1
    assert serve(gateway, turns("q" * 100, "a", "b")) is not first
    long = "q" * int(4 * LOAD)
    kept = serve(gateway, turns(long))
    kept.slots.count += 1
    assert serve(gateway, turns(long, "a", "b")) is kept
