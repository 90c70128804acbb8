"""Keys by turns, persons by turns, then by arrival."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.fair_queue import Claim, FairQueue


@dataclass(eq=False)
class One:
    claim: Claim
    name: str = ""


def line(*words: str) -> tuple[FairQueue[One], list[One]]:
    """`a`: of key a; `a.x`: of person x behind it."""
    made: FairQueue[One] = FairQueue()
    ones = [One(Claim(*word.split(".")), f"{number}{word}") for number, word in enumerate(words)]
    for stamp, one in enumerate(ones):
        made.add(one, stamp)
    return made, ones


def drain(made: FairQueue[One]) -> list[One]:
    order = []
    stamp = 1000
    while made.count:
        _, one = made.head()
        made.remove(one)
        stamp += 1
        made.served(one.claim, stamp)
        order.append(one)
    return order


def test_keys_take_turns() -> None:
    made, _ = line("a", "a", "a", "b", "c", "c")
    assert [one.name for one in drain(made)] == ["0a", "3b", "4c", "1a", "5c", "2a"]


def test_persons_behind_a_key_take_turns() -> None:
    made, _ = line("k.x", "k.x", "k.x", "k.y", "z")
    assert [one.name for one in drain(made)] == ["0k.x", "4z", "3k.y", "1k.x", "2k.x"]


def test_who_leaves_from_the_middle_costs_his_key_nothing() -> None:
    made, ones = line("a", "a", "b", "a")
    made.remove(ones[0])
    made.remove(ones[1])
    assert [one.name for one in drain(made)] == ["3a", "2b"]


def test_key_that_was_served_elsewhere_goes_to_the_end() -> None:
    made, _ = line("a", "b")
    made.served(Claim("a"), 50)
    made.served(Claim("nobody"), 51)
    assert made.head() == (1, made.head()[1])
    assert [one.name for one in drain(made)] == ["1b", "0a"]


def test_newcomer_is_told_how_many_go_before_him() -> None:
    made, _ = line("a", "a", "a", "b")
    assert [made.count_ahead_of_new(key) for key in ("c", "b", "a")] == [2, 3, 4]
    assert FairQueue[One]().count_ahead_of_new("a") == 0


words = st.lists(st.sampled_from(("a", "a", "a.x", "a.y", "b", "c.x", "c.y")), max_size=20)


@given(words)
def test_order_that_is_told_is_the_order_of_service(given: list[str]) -> None:
    made, _ = line(*given)
    told = list(made.in_order())
    assert drain(made) == told
    assert repr(made) == "<Line 0 of 0 keys>"


@given(words, st.data())
def test_line_holds_exactly_those_who_came_and_have_not_left(given: list[str], data: st.DataObject) -> None:
    made, ones = line(*given)
    for one in data.draw(st.lists(st.sampled_from(ones), unique_by=id)) if ones else []:
        made.remove(one)
        ones.remove(one)
    assert made.count == len(ones)
    assert set(drain(made)) == set(ones)
