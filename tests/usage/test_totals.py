"""Totals: what exchanges add up to."""

import pytest

from gateway.chat.answer import CachedUsage, Usage
from gateway.telemetry.exchange import NONE, Attribution
from gateway.usage import totals
from gateway.usage.totals import COUNTS, DIMENSIONS, Totals, is_row, summed
from tests.fakes.exchanges import exchange

DAY = "2026-11-29"


def only(found: Totals) -> tuple[tuple[str, ...], dict[str, float]]:
    ((group, counts),) = found.rows.items()
    return tuple(group), dict(zip(COUNTS, counts, strict=True))


def test_served_request_counts_its_tokens_images_and_seconds() -> None:
    found = Totals()
    found.add(exchange(key="web", key_id="web"), Attribution("ada", 2), DAY)
    group, counts = only(found)
    assert group == ("web", "ada", "standard", "vllm", DAY)
    assert counts == {
        "requests": 1, "refused": 0, "prompt_tokens": 10, "completion_tokens": 101, "cached_tokens": 0, "images": 2,
        "seconds": 1.25,
    }  # fmt: skip


def test_refused_request_is_one_that_no_backend_began_to_serve() -> None:
    found = Totals()
    refused = {"attempts": 0, "usage": None, "upstream": 0.0, "backend": NONE, "tier": NONE}
    found.add(exchange(**refused | {"status": 429, "outcome": "client_error"}), None, DAY)
    found.add(exchange(**refused | {"status": 503, "outcome": "rejected"}), None, DAY)
    found.add(exchange(**refused | {"status": 499, "outcome": "cancelled"}), None, DAY)  # the client left the queue
    found.add(exchange(**refused | {"status": 200, "outcome": "ok"}), None, DAY)  # nothing to do for a backend
    group, counts = only(found)
    assert group == (NONE, NONE, NONE, NONE, DAY)
    assert (counts["refused"], counts["requests"]) == (2, 0)


def test_request_that_failed_or_was_left_at_a_backend_counts_with_what_was_sent() -> None:
    found = Totals()
    cut = {"usage": None, "sent_tokens": 7, "attempts": 1}
    found.add(exchange(**cut | {"status": 499, "outcome": "cancelled"}), None, DAY)
    found.add(exchange(**cut | {"status": 502, "outcome": "upstream_error"}), None, DAY)
    _, counts = only(found)
    assert (counts["requests"], counts["refused"]) == (2, 0)
    assert (counts["completion_tokens"], counts["prompt_tokens"]) == (14, 0)


def test_answer_of_which_a_part_broke_off_counts_both_parts() -> None:
    """Of several choices, one may have its backend's counts and another one may not."""
    found = Totals()
    found.add(exchange(sent_tokens=4), None, DAY)
    assert only(found)[1]["completion_tokens"] == 105


def test_cached_tokens_are_those_that_the_engine_reports() -> None:
    found = Totals()
    found.add(exchange(usage=CachedUsage(10, 5, 8)), None, DAY)
    found.add(exchange(usage=Usage(10, 5)), None, DAY)
    assert only(found)[1]["cached_tokens"] == 8


def test_persons_are_bounded_for_each_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totals, "MAX_PERSONS", 2)
    found = Totals()
    for person in ("a", "b", "c", "a", "d"):
        found.add(exchange(), Attribution(person), DAY)
    assert {group.person: counts[0] for group, counts in found.rows.items()} == {"a": 2, "b": 1, "(others)": 2}
    found.add(exchange(), Attribution("c"), "2026-11-30")
    assert [group.person for group in found.rows if group.day == "2026-11-30"] == ["c"]


def test_flood_of_names_at_one_key_hides_no_person_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totals, "MAX_PERSONS", 3)
    monkeypatch.setattr(totals, "MAX_PERSONS_OF_ALL", 5)
    found = Totals()
    for number in range(100):
        found.add(exchange(key="noisy"), Attribution(f"x{number}"), DAY)
    for person in ("a", "b", "c"):
        found.add(exchange(key="web"), Attribution(person), DAY)
    persons = [(group.key, group.person) for group in found.rows if group.person != "(others)"]
    assert persons == [("noisy", "x0"), ("noisy", "x1"), ("noisy", "x2"), ("web", "a"), ("web", "b")]
    assert len(found.rows) == 7


def test_names_in_any_script_are_readable_and_short() -> None:
    found = Totals()
    found.add(exchange(), Attribution("김민준".encode().decode("latin-1")), DAY)
    found.add(exchange(), Attribution("x" * 1000), DAY)
    found.add(exchange(), Attribution("\xff\xfe"), DAY)
    assert [group.person for group in found.rows] == ["김민준", "x" * 128, "\xff\xfe"]


def test_rows_that_were_not_written_are_added_again_and_bounded() -> None:
    found, other = Totals(), Totals()
    for each in (found, other):
        each.add(exchange(), None, DAY)
    other.add(exchange(tier="b"), None, DAY)
    other.add(exchange(tier="c"), None, DAY)
    assert found.merge(other.take().items(), 2) == 1
    assert sorted((group.tier, counts[0]) for group, counts in found.rows.items()) == [("b", 1), ("standard", 2)]
    assert other.rows == {}


def test_rows_are_summed_by_fields_and_sorted() -> None:
    sums = dict.fromkeys(COUNTS, 1)
    rows = [{"key": key, "day": day, **sums} for key, day in (("web", "2"), ("ops", "1"), ("web", "1"))]
    assert [(row["key"], row["requests"]) for row in summed(rows, ["key"])] == [("ops", 1), ("web", 2)]
    assert list(summed(rows, ["key"])[0]) == ["key", *COUNTS]
    assert [row["requests"] for row in summed(rows, [])] == [3]
    assert summed([], ["key"]) == []
    assert rows[0]["requests"] == 1


def test_row_of_another_program_needs_all_fields() -> None:
    whole = {**dict.fromkeys(DIMENSIONS, "x"), **dict.fromkeys(COUNTS, 1)}
    assert is_row(whole)
    assert not is_row(whole | {"requests": "1"})
    assert not is_row({name: value for name, value in whole.items() if name != "key"})
