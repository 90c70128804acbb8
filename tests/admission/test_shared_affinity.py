"""Replicas tell each other what they have in flight and where prompts went, and then choose as one."""

import msgspec
import pytest

from gateway.admission.affinity import LOAD, Affinity
from gateway.admission.prefix_cache import PrefixCache
from gateway.admission.server_slots import ServerSlots
from gateway.admission.shared_affinity import (
    BEAT,
    FEW_REPLICAS,
    INTERVAL,
    MOST_PLACED,
    REPEAT,
    SILENCE,
    BackendNews,
    News,
    SharedAffinity,
)
from gateway.chat.message import Message
from gateway.chat.prompt_blocks import PromptBlocks, prompt_blocks
from gateway.chat.request import Chat
from tests.fakes.admission import Request, Server, setup

SYSTEM = "s" * 8000


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


class Replica:
    """One replica with four servers, which the others know by the same places."""

    def __init__(self, name: str, number: int = 4) -> None:
        servers = tuple(Server("m") for _ in range(number))
        for seed, server in enumerate(servers):
            server.prefixes.seed = seed
            server.place = f"place {seed}"
        self.affinity: Affinity | None = Affinity()
        self.gateway = setup(*servers, affinity=self.affinity, slots=100, model=100)
        self.servers = servers
        self.shared = SharedAffinity(name, {"backend": self})
        self.shared.step(0.0)

    def begin(self, prompt: PromptBlocks) -> tuple[Request, int]:
        """Begin a request, and return it with the number of its server."""
        request = self.gateway.arrive(prompt=prompt)
        assert request.placement is not None
        return request, number_of(self, request.placement.server)

    def serve(self, prompt: PromptBlocks) -> int:
        request, number = self.begin(prompt)
        self.gateway.admission.first_token(request)
        self.gateway.leave(request)
        return number


def number_of(replica: Replica, server: ServerSlots) -> int:
    return [id(one) for one in replica.servers].index(id(server))


def tell(now: float, *replicas: Replica) -> list[bytes]:
    """Have each replica say what is new, and the others hear it. Return the messages."""
    messages = [message for replica in replicas if (message := replica.shared.step(now)) is not None]
    for replica in replicas:
        for message in messages:
            replica.shared.receive(message)
    return messages


def elsewhere(replica: Replica) -> list[float]:
    return [server.prefixes.elsewhere for server in replica.servers]


def test_what_others_have_in_flight_counts_until_it_has_ended() -> None:
    one, other = Replica("one"), Replica("other")
    request, number = one.begin(turns("q" * 3000))
    tell(1.0, one, other)
    assert elsewhere(other) == [LOAD + 3000 if place == number else 0 for place in range(4)]
    one.gateway.admission.first_token(request)
    tell(2.0, one, other)
    assert elsewhere(other)[number] == LOAD
    one.gateway.leave(request)
    tell(3.0, one, other)
    assert elsewhere(other) == [0] * 4
    assert elsewhere(one) == [0] * 4


def test_prompt_that_everyone_sends_spreads_over_the_servers_of_all_replicas() -> None:
    replicas = [Replica("one"), Replica("two"), Replica("three")]
    for number in range(120):
        replica = replicas[number % 3]
        request, _ = replica.begin(turns(f"{number}", system=SYSTEM))
        replica.gateway.admission.first_token(request)
        tell(number * INTERVAL, *replicas)
    loads = [sum(replica.servers[place].slots.count for replica in replicas) for place in range(4)]
    assert sum(loads) == 120
    assert max(loads) <= 1.3 * 120 / 4


def test_system_message_that_one_replica_sent_is_warm_for_the_others() -> None:
    one, other = Replica("one"), Replica("other")
    sent = {one.serve(turns("hello", system=SYSTEM))}
    tell(1.0, one, other)
    prompt = turns("something else", system=SYSTEM)
    warm = {number for number, server in enumerate(other.servers) if server.prefixes.known_blocks(prompt)}
    assert warm == sent
    assert other.servers[min(sent)].prefixes.known_blocks(prompt) == prompt.common


@pytest.mark.parametrize("shared", ["", SYSTEM])
def test_conversation_that_began_or_moved_away_from_home_is_found_by_the_others(shared: str) -> None:
    one, other = Replica("one"), Replica("other")
    for count in range(12):
        question = f"{count}" + "q" * 3000
        home = one.serve(turns(question, system=shared))
        one.servers[home].slots.count += 50
        moved = one.serve(turns(question, "a" * 3000, "next", system=shared))
        assert moved != home
        tell(float(count), one, other)
        other.shared.go_alone()  # what is in flight shall not decide here
        assert other.serve(turns(question, "a" * 3000, "next", "a", "last", system=shared)) == moved
        one.servers[home].slots.count -= 50


def test_conversation_that_came_back_is_expected_at_its_last_server_alone() -> None:
    one, other = Replica("one"), Replica("other")
    begun, continued = turns("q" * 3000), turns("q" * 3000, "a" * 3000, "next")
    home = one.serve(begun)
    tell(1.0, one, other)
    one.servers[home].slots.count += 50
    away = one.serve(continued)
    tell(2.0, one, other)
    assert other.servers[away].prefixes.known_blocks(continued)
    one.servers[home].slots.count -= 50
    one.servers[away].slots.count += 50
    back = one.serve(turns("q" * 3000, "a" * 3000, "next", "a", "last"))
    assert back != away
    tell(3.0, one, other)
    assert not other.servers[away].prefixes.known_blocks(continued)


def test_conversation_at_home_is_not_told() -> None:
    one, other = Replica("one"), Replica("other")
    for count in range(20):
        one.serve(turns(f"{count}" + "q" * 3000))
        one.serve(turns(f"{count}" + "q" * 3000, "answer", "next"))
    assert tell(1.0, one, other) == []


def test_nothing_is_told_while_nothing_changes_but_a_sign_of_life() -> None:
    one, other = Replica("one"), Replica("other")
    assert tell(1.0, one, other) == []
    request, _ = one.begin(turns("q" * 3000))
    assert len(tell(2.0, one, other)) == 1
    assert tell(2.0 + BEAT / 2, one, other) == []
    assert len(tell(2.0 + BEAT, one, other)) == 1
    one.gateway.leave(request)
    assert len(tell(4.0, one, other)) == 1
    assert tell(9.0, one, other) == []


def test_replica_that_is_not_heard_any_more_counts_for_nothing() -> None:
    one, other = Replica("one"), Replica("other")
    one.begin(turns("q" * 3000))
    tell(1.0, one, other)
    other.shared.step(1.0 + SILENCE)
    assert any(elsewhere(other))
    other.shared.step(1.1 + SILENCE)
    assert elsewhere(other) == [0] * 4


def test_server_that_is_new_here_has_what_others_have_in_flight_there() -> None:
    """Such as after reread settings, or when an address is back."""
    one, other = Replica("one"), Replica("other")
    _, number = one.begin(turns("q" * 3000))
    tell(1.0, one, other)
    other.servers[number].prefixes = PrefixCache(seed=number)
    tell(1.0 + BEAT, one, other)
    assert elsewhere(other)[number] == LOAD + 3000


def test_without_a_way_to_the_others_only_its_own_requests_count() -> None:
    one, other = Replica("one"), Replica("other")
    one.begin(turns("q" * 3000))
    tell(1.0, one, other)
    other.shared.go_alone()
    assert elsewhere(other) == [0] * 4


def test_system_message_is_told_again_only_after_a_while() -> None:
    one, other = Replica("one"), Replica("other")

    def roots(now: float) -> int:
        one.serve(turns(f"{now}", system=SYSTEM))
        return sum(
            len(msgspec.json.decode(message, type=News).backends["backend"].roots) for message in tell(now, one, other)
        )

    assert [roots(now) for now in (1.0, 1.0 + REPEAT / 2, 1.0 + REPEAT)] == [1, 0, 1]


def test_many_replicas_tell_less_often() -> None:
    one = Replica("one")
    assert one.shared.interval == INTERVAL
    for number in range(5 * FEW_REPLICAS):
        one.shared.receive(msgspec.json.encode(News(f"{number}", {})))
    assert one.shared.interval == pytest.approx(5 * INTERVAL)


def test_what_is_kept_for_a_message_is_bounded() -> None:
    one = Replica("one")
    for number in range(MOST_PLACED + 10):
        one.serve(turns(f"{number}"))
    assert one.affinity is not None
    assert one.affinity.placed is not None
    assert len(one.affinity.placed) == MOST_PLACED
    one.shared.step(1.0)
    assert not one.affinity.placed


def test_what_was_told_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.admission.shared_affinity.MOST_KEPT", 2)
    one = Replica("one")

    def tell(system: str) -> bool:
        """Return whether the system message is told, as one that was not told of late."""
        one.serve(turns("question", system=system * 8000))
        message = one.shared.step(one.shared._now + INTERVAL)
        return message is not None and bool(msgspec.json.decode(message, type=News).backends["backend"].roots)

    assert [tell(system) for system in "aba"] == [True, True, False]
    one.shared._now += REPEAT
    assert [tell(system) for system in "acab"] == [True, True, False, True]
    assert len(one.shared._told_roots) == 2


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"replica": "x"}',
        msgspec.json.encode(News("x", {"unknown": BackendNews(["a"], [(0, 1, 1)], [(0, 1, 1)], [(0, 1, 1)])})),
        msgspec.json.encode(News("x", {"backend": BackendNews([], [(0, 1, 1)], [(7, 1, 1)], [(-1, 1, 1)])})),
        msgspec.json.encode(News("x", {"backend": BackendNews(["place 0"], [(0, -1, -1)], [(0, 1, 0)], [(0, 1, -5)])})),
        msgspec.json.encode(News("x", {"backend": BackendNews(["gone"], [(0, 1, 1)], [(0, 1, 1)], [(0, 1, 1)])})),
    ],
)
def test_message_that_makes_no_sense_here_changes_nothing(message: bytes) -> None:
    one = Replica("one")
    one.shared.receive(message)
    assert elsewhere(one) == [0] * 4
    assert [len(server.prefixes._known) for server in one.servers] == [0] * 4


def test_backend_that_is_not_chosen_by_prefixes_tells_nothing() -> None:
    one, other = Replica("one"), Replica("other")
    one.affinity = other.affinity = None
    one.begin(turns("q" * 3000))
    assert tell(1.0, one, other) == []


def test_marks_of_others_are_forgotten_like_prompts_and_with_a_restart() -> None:
    cache = PrefixCache(tokens=500)  # 2,000 characters
    prompt = turns("q" * 900, "a" * 100, "next")
    cache.mark(prompt.home, 1500)
    assert cache.known_blocks(prompt) == len(prompt.hashes) - 1
    cache.mark(12345, 1500)
    assert cache.known_blocks(prompt) == 0
    cache.mark(prompt.home, 500)
    cache.clear()
    assert cache.known_blocks(prompt) == 0


def test_root_that_this_replica_sent_too_is_counted_once() -> None:
    cache = PrefixCache()
    prompt = turns("hello", system=SYSTEM)
    cache.add(prompt)
    cache.remember_root(prompt)
    before = cache._size
    cache.mark_root(prompt.root, len(SYSTEM))
    assert cache._size == before
