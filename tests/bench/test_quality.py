import json

import pytest

from gateway.bench.quality import QualityOptions, measure
from gateway.bench.quality_scores import recommendation, rows
from gateway.bench.quality_tasks import built_in
from gateway.bench.results import RequestRecord
from gateway.bench.target import BenchRequest
from tests.bench.answering_client import AnsweringClient, answered
from tests.bench.quality_answers import RIGHT, WRONG

TEXT_TASKS = [task for task in built_in() if not task.has_code]
NO_CODE = QualityOptions(TEXT_TASKS, repeats=3)


def knows(answers: dict[str, str]) -> AnsweringClient:
    return AnsweringClient(lambda request, number: answered(answers[request.name]))


async def test_a_model_that_knows_every_answer_has_five_points_in_everything() -> None:
    [side] = await measure(QualityOptions(built_in(), repeats=2), [knows(RIGHT)])
    assert [(task.name, task.total) for task in side.tasks] == [(task.name, 5.0) for task in built_in()]
    assert side.guards is not None


async def test_the_better_of_two_models_is_recommended() -> None:
    good, bad = await measure(NO_CODE, [knows(RIGHT), knows(WRONG)])
    assert recommendation(good, bad) == "quality_prefer_a"
    assert all(row.better == "A" for row in rows(good, bad))


async def test_the_sides_are_asked_in_turn_task_by_task_with_the_same_words() -> None:
    order: list[str] = []

    def side(label: str) -> AnsweringClient:
        def reply(request: BenchRequest, number: int) -> RequestRecord:
            order.append(f"{label} {request.name}")
            return answered("")

        return AnsweringClient(reply, label)

    a, b = side("A"), side("B")
    await measure(QualityOptions(TEXT_TASKS, repeats=1), [a, b])
    assert order == [f"{label} {task.name}" for task in TEXT_TASKS for label in "AB"]
    assert a.requests == b.requests


async def test_repeats_differ_in_their_seed_alone() -> None:
    client = knows(RIGHT)
    await measure(QualityOptions(TEXT_TASKS[:1], repeats=3, seed=5, parameters={"top_p": 0.9}), [client])
    assert [request.parameters["seed"] for request in client.requests] == [5, 6, 7]
    assert {request.parameters["top_p"] for request in client.requests} == {0.9}


async def test_code_is_not_run_where_the_user_does_not_want_it() -> None:
    code = [task for task in built_in() if task.name == "merge-intervals"]
    [side] = await measure(QualityOptions(code, repeats=1, runs_code=False), [knows(RIGHT)])
    assert side.guards is None
    assert side.tasks[0].dimension("accuracy") is None
    assert side.tasks[0].dimension("code_quality") == 5


async def test_failed_requests_score_0_and_are_counted() -> None:
    failing = AnsweringClient(lambda request, number: answered("", error="http_503"))
    good, bad = await measure(NO_CODE, [knows(RIGHT), failing])
    assert {task.total for task in bad.tasks} == {0.0}
    assert bad.failed_share == 1
    assert recommendation(good, bad) == "quality_many_failures"


async def test_an_answer_that_varies_is_less_consistent() -> None:
    task = next(task for task in TEXT_TASKS if task.name == "review-as-json")
    varying = AnsweringClient(lambda request, number: answered((RIGHT if number else WRONG)[task.name]))
    [side] = await measure(QualityOptions([task], repeats=3), [varying])
    assert side.tasks[0].dimension("consistency") == 0
    assert side.tasks[0].dimension("accuracy") == pytest.approx(10 / 3)


async def test_a_judge_grades_what_no_program_decides() -> None:
    grader = AnsweringClient(lambda request, number: answered('{"accuracy": 2, "clarity": 4}'), model="grader")
    [side] = await measure(NO_CODE, [knows(RIGHT)], grader)
    scores = {task.name: task.dimensions for task in side.tasks}
    assert scores["queue-for-one-gpu"]["accuracy"] == pytest.approx(2)
    assert scores["review-as-json"]["accuracy"] == 5
    assert scores["review-as-json"]["clarity"] == pytest.approx(4)
    assert side.judge == "grader"


async def test_other_tasks_or_another_way_of_asking_give_another_digest() -> None:
    digests = {
        NO_CODE.digest(""),
        NO_CODE.digest("grader"),
        QualityOptions(TEXT_TASKS, repeats=4).digest(""),
        QualityOptions(TEXT_TASKS[1:], repeats=3).digest(""),
        QualityOptions(TEXT_TASKS, repeats=3, temperature=0).digest(""),
    }
    assert len(digests) == 5
    assert QualityOptions(list(TEXT_TASKS), repeats=3).digest("") == NO_CODE.digest("")


async def test_results_hold_no_answer_and_no_prompt() -> None:
    sides = await measure(NO_CODE, [knows(RIGHT), knows(WRONG)])
    text = json.dumps([side.to_json() for side in sides], ensure_ascii=False)
    for task in TEXT_TASKS:
        for secret in (task.prompt[:40], RIGHT[task.name][:30], WRONG[task.name][:20]):
            assert secret not in text


async def test_answers_that_reach_the_limit_of_tokens_are_counted() -> None:
    cut = AnsweringClient(lambda request, number: answered("", finish="length" if number else "stop"))
    [side] = await measure(QualityOptions(TEXT_TASKS[:1], repeats=3), [cut])
    assert (side.cut, side.failed, side.asked) == (2, 0, 3)
