"""Order of service: keys in turn, the persons of a key in turn, then by arrival."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.fair_queue import Claim, FairQueue


@dataclass(eq=False)
class Item:
    claim: Claim
    name: str = ""


def queue_of(*owners: str) -> tuple[FairQueue[Item], list[Item]]:
    """Return a queue with a request for each owner, and these requests.

    The owner `a` is the key a, and `a.x` is person x behind that key.
    """
    queue: FairQueue[Item] = FairQueue()
    items = [Item(Claim(*word.split(".")), f"{number}{word}") for number, word in enumerate(owners)]
    for stamp, item in enumerate(items):
        queue.add(item, stamp)
    return queue, items


def drain(queue: FairQueue[Item]) -> list[Item]:
    order = []
    stamp = 1000
    while queue.count:
        _, item = queue.head()
        queue.remove(item)
        stamp += 1
        queue.served(item.claim, stamp)
        order.append(item)
    return order


def test_keys_take_turns() -> None:
    queue, _ = queue_of("a", "a", "a", "b", "c", "c")
    assert [item.name for item in drain(queue)] == ["0a", "3b", "4c", "1a", "5c", "2a"]


def test_persons_of_a_key_take_turns() -> None:
    queue, _ = queue_of("k.x", "k.x", "k.x", "k.y", "z")
    assert [item.name for item in drain(queue)] == ["0k.x", "4z", "3k.y", "1k.x", "2k.x"]


def test_removal_from_the_middle_does_not_cost_the_key_its_turn() -> None:
    queue, items = queue_of("a", "a", "b", "a")
    queue.remove(items[0])
    queue.remove(items[1])
    assert [item.name for item in drain(queue)] == ["3a", "2b"]


def test_key_served_from_another_queue_goes_to_the_end() -> None:
    queue, _ = queue_of("a", "b")
    queue.served(Claim("a"), 50)
    queue.served(Claim("nobody"), 51)
    assert queue.head() == (1, queue.head()[1])
    assert [item.name for item in drain(queue)] == ["1b", "0a"]


def test_count_ahead_of_a_new_request_depends_on_its_key() -> None:
    queue, _ = queue_of("a", "a", "a", "b")
    assert [queue.count_ahead_of_new(key) for key in ("c", "b", "a")] == [2, 3, 4]
    assert FairQueue[Item]().count_ahead_of_new("a") == 0


owners = st.lists(st.sampled_from(("a", "a", "a.x", "a.y", "b", "c.x", "c.y")), max_size=20)


@given(owners)
def test_in_order_is_the_order_of_service(given: list[str]) -> None:
    queue, _ = queue_of(*given)
    expected = list(queue.in_order())
    assert drain(queue) == expected
    assert repr(queue) == "<FairQueue 0 of 0 keys>"


@given(owners, st.data())
def test_queue_holds_exactly_the_requests_added_and_not_removed(given: list[str], data: st.DataObject) -> None:
    queue, items = queue_of(*given)
    for item in data.draw(st.lists(st.sampled_from(items), unique_by=id)) if items else []:
        queue.remove(item)
        items.remove(item)
    assert queue.count == len(items)
    assert set(drain(queue)) == set(items)


def test_request_added_first_is_served_first_and_costs_the_others_only_that_turn() -> None:
    queue, _ = queue_of("a", "b", "c")
    queue.add_first(Item(Claim("c"), "again"))
    assert [item.name for item in drain(queue)] == ["again", "0a", "1b", "2c"]


def test_request_added_first_comes_before_other_persons_and_requests_of_its_key() -> None:
    queue, _ = queue_of("k.x", "k.y", "k.x", "z")
    queue.add_first(Item(Claim("k", "y"), "again"))
    first, *others = drain(queue)
    assert (first.name, len(others), queue.count) == ("again", 4, 0)


def test_key_of_a_request_added_first_comes_before_the_keys_of_other_queues() -> None:
    queue, _ = queue_of("a", "b")
    queue.add_first(Item(Claim("b"), "again"))
    stamp, item = queue.head()
    assert (stamp, item.name) == (0, "again")
