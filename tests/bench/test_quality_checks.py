import json
from typing import Any

import pytest

from gateway.bench.quality_checks import Answer, json_value, python_code, score_answer
from gateway.bench.quality_tasks import (
    Absent,
    Check,
    Fenced,
    Finished,
    JsonParses,
    Language,
    Length,
    Mentions,
    NotRepetitive,
    PythonRuns,
    Structure,
    Task,
    built_in,
)
from tests.bench.quality_answers import RIGHT, WRONG


async def value(check: Check, text: str, *, language: Any = "en", finish: str = "stop") -> float | None:
    task = Task("t", "question", "s", [check], language=language)
    return (await score_answer(task, Answer(text, finish), checks=[check]))[0].value


@pytest.mark.parametrize("task", built_in(), ids=lambda task: task.name)
async def test_a_right_answer_has_every_point_and_a_wrong_one_fewer_in_accuracy(task: Task) -> None:
    right = await score_answer(task, Answer(RIGHT[task.name]))
    assert {(point.kind, point.value) for point in right if point.value != 1} == set()
    wrong = [point for point in await score_answer(task, Answer(WRONG[task.name])) if point.measures == "accuracy"]
    assert sum(point.points * (point.value or 0) for point in wrong) < 0.7 * sum(point.points for point in wrong)


@pytest.mark.parametrize("answer", [Answer("", error="http_503"), Answer(""), Answer("<think>hm</think> ")])
async def test_no_answer_scores_nothing_in_every_check(answer: Answer) -> None:
    for task in built_in():
        assert {point.value for point in await score_answer(task, answer)} == {0}


async def test_code_is_scored_by_the_share_of_its_tests() -> None:
    check = PythonRuns(tests=["f(1) == 1", "f(2) == 2", "f(3) == 3", "f(4) == 5"])
    assert await value(check, "```python\ndef f(x):\n    return x\n```") == 0.75
    assert await value(check, "```python\ndef f(x)\n    return x\n```") == 0
    assert await value(check, "no code") == 0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\ndef old(): 1\n```\nto\n```python\ndef new(): 2\n```\n```python\nnew()\n```", "def new(): 2\n"),
        ("~~~py\nx = 1\n~~~", "x = 1\n"),
        ("```bash\nls\n```\n```\nclass A: ...\n```", "class A: ...\n"),
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("def f is a function", None),
        ("```js\nlet x\n```", None),
    ],
)  # fmt: skip
def test_the_code_of_an_answer_is_found(text: str, code: str | None) -> None:
    assert python_code(text) == code


async def test_json_is_scored_by_its_schema_and_its_values() -> None:
    check = JsonParses(values={"a.0.b": 1, "c": "x"}, schema={"type": "object", "required": ["a"]})
    right = {"a": [{"b": 1}], "c": "x"}
    assert await value(check, json.dumps(right)) == 1
    assert await value(check, f"```json\n{json.dumps(right)}\n```") == 1
    assert await value(check, json.dumps({"a": [{"b": 2}], "c": "x"})) == pytest.approx(2 / 3)
    assert await value(check, '{"c": "x"}') == 0
    assert await value(check, "{") == 0


def test_json_is_not_taken_from_prose() -> None:
    with pytest.raises(ValueError, match="no JSON"):
        json_value('Here you are: {"a": 1}')


async def test_points_are_counted_by_any_of_their_words_without_regard_to_case() -> None:
    check = Mentions(required=[["injection", "placeholder"], ["close[sd]?"], ["주입"]])
    assert await value(check, "Use a PLACEHOLDER and 주입") == pytest.approx(2 / 3)
    assert await value(Absent(patterns=["sorry"]), "Sorry, no") == 0
    assert await value(Absent(patterns=["sorry"]), "Yes") == 1


@pytest.mark.parametrize(
    ("check", "text", "expected"),
    [
        (Fenced(), "```python\nx\n```", 1),
        (Fenced(), "```\nx\n```", 0.5),
        (Fenced(), "x", 0),
        (Length(at_least=2, at_most=3), "one two", 1),
        (Length(at_least=2, at_most=3), "one", 0),
        (Length(at_most=3), "one two three four", 0),
        (Structure(items=3), "# A\n- b\n1. c", 1),
        (Structure(items=4), "# A\n- b\nc", 0.5),
        (NotRepetitive(), "the same again and again it never comes to an end " * 20, 0),
        (NotRepetitive(), " ".join(map(str, range(200))), 1),
    ],
)
async def test_clarity_is_scored_by_stated_checks(check: Check, text: str, expected: float) -> None:
    assert await value(check, text) == expected


async def test_a_cut_answer_is_not_finished_and_an_unknown_end_is_not_scored() -> None:
    assert await value(Finished(), "x", finish="length") == 0
    assert await value(Finished(), "x", finish="stop") == 1
    assert await value(Finished(), "x", finish="") is None


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("ko", "서버는 GPU를 한 대 씁니다.", 1),
        ("ko", "The server uses one GPU.", 0),
        ("ko", "서버는 请求 처리합니다.", 0),
        ("ko", '{"a": 3}', 0),
        ("ko", "42", 1),
        ("en", "The naïve server uses one GPU.", 1),
        ("en", "The server は slow and 慢 indeed.", 0),
        ("en", "서버는 느립니다.", 0),
        ("en", "Fixed:\n```python\nx = '서버'\n```", 1),
    ],
)
async def test_prose_has_to_be_in_the_language_of_the_task(language: str, text: str, expected: float) -> None:
    assert await value(Language(), text, language=language) == expected


async def test_reasoning_before_the_answer_is_not_scored() -> None:
    assert await value(JsonParses(), "<think>{hm</think>\n[1]") == 1
