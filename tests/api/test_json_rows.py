"""Answers with a list that may be long: the text of one object, made in steps."""

import json
from collections.abc import Iterator

import pytest

from gateway.api.json_rows import ROWS, object_steps, rows_response

FIELDS = {"day": "2026-11-29", "complete": True, "since": None}


@pytest.mark.parametrize("count", [0, 1, ROWS, 2 * ROWS + 1])
async def test_answer_is_one_object_with_all_rows(count: int) -> None:
    rows = [{"name": f"key \u4f60 {number}", "seconds": number / 3, "tiers": None} for number in range(count)]
    answer = await rows_response(FIELDS, "keys", iter(rows))
    assert json.loads(bytes(answer.body)) == {**FIELDS, "keys": rows}
    assert answer.headers["content-type"] == "application/json"


def test_others_get_a_turn_after_some_rows_that_are_made_one_by_one() -> None:
    made = 0

    def rows() -> Iterator[dict[str, int]]:
        nonlocal made
        for number in range(10 * ROWS):
            made += 1
            yield {"number": number}

    steps = object_steps(FIELDS, "rows", rows())
    assert [made for _ in steps] == [ROWS * step for step in range(1, 11)]
