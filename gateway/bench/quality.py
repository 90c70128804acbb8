"""Run of quality tasks on one or two sides: ask each side in turn, score, keep the points and drop the answers."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gateway.bench.quality_checks import Answer, Point, score_answer
from gateway.bench.quality_judge import checks_beside_judge, judge
from gateway.bench.quality_sandbox import CAN_RUN, CodeRun, run_code
from gateway.bench.quality_scores import SideQuality, TaskScore
from gateway.bench.quality_tasks import PythonRuns, Task
from gateway.bench.target import BenchRequest, LoadClient

REPEATS = 3
TEMPERATURE = 0.7
TIMEOUT = 600.0


@dataclass(frozen=True, slots=True)
class QualityOptions:
    """Options of the questions.

    Attributes:
        repeats: times that each task is asked, with the seeds `seed`, `seed` + 1, and so on.
        runs_code: False leaves out the checks that execute code.
        parameters: further fields of each request's body.
    """

    tasks: Sequence[Task]
    repeats: int = REPEATS
    temperature: float = TEMPERATURE
    seed: int = 0
    runs_code: bool = CAN_RUN
    parameters: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = TIMEOUT

    def digest(self, judge_model: str) -> str:
        """Return a digest of everything that has to be equal for two sides to be comparable."""
        asked = [self.repeats, self.temperature, self.seed, self.runs_code, dict(self.parameters), judge_model]
        text = msgspec.json.encode([asked, list(self.tasks)], order="deterministic")
        return hashlib.sha256(text).hexdigest()


class _CodeRunner:
    """Runs code one at a time, and keeps which guards held."""

    def __init__(self) -> None:
        self.guards: dict[str, bool] | None = None
        self._turn = asyncio.Lock()

    async def __call__(self, code: str, tests: Sequence[str], *, seconds: float) -> CodeRun:
        async with self._turn:
            outcome = await run_code(code, tests, seconds=seconds)
        for name, held in outcome.guards.items():
            self.guards = {**(self.guards or {}), name: held and (self.guards or {}).get(name, True)}
        return outcome


async def measure(
    options: QualityOptions,
    clients: Sequence[LoadClient],
    judge_client: LoadClient | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[SideQuality]:
    """Ask every task of every client, task by task and side by side.

    Calls `progress` after each task of each side.
    """
    judge_model = "" if judge_client is None else judge_client.target.model
    runner = _CodeRunner()
    scores: list[list[TaskScore]] = [[] for _ in clients]
    for task in options.tasks:
        for client, found in zip(clients, scores, strict=True):
            found.append(await _task(options, task, client, judge_client, runner))
            progress()
    digest = options.digest(judge_model)
    return [
        SideQuality(
            client.target.model,
            tuple(found),
            digest,
            options.repeats,
            options.temperature,
            judge_model,
            runner.guards,
        )
        for client, found in zip(clients, scores, strict=True)
    ]


async def _task(
    options: QualityOptions, task: Task, client: LoadClient, judge_client: LoadClient | None, runner: _CodeRunner
) -> TaskScore:
    async def once(number: int) -> tuple[Answer, tuple[Point, ...]]:
        answer = await _ask(options, task, client, options.seed + number)
        return answer, tuple(await _score(options, task, answer, judge_client, runner))

    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(once(number)) for number in range(options.repeats)]
    results = [one.result() for one in asked]
    failures = sum(bool(answer.error) for answer, _ in results)
    cut = sum(answer.finish == "length" for answer, _ in results)
    return TaskScore(task.name, task.scenario, tuple(points for _, points in results), failures, cut)


async def _ask(options: QualityOptions, task: Task, client: LoadClient, seed: int) -> Answer:
    system = ({"role": "system", "content": task.system},) if task.system else ()
    request = BenchRequest(
        messages=(*system, {"role": "user", "content": task.prompt}),
        max_tokens=task.max_tokens,
        language=task.language,
        name=task.name,
        parameters={"temperature": options.temperature, "seed": seed, **options.parameters},
        timeout=options.timeout,
        keeps_text=True,
    )
    record = await client.send(request)
    return Answer(record.text, record.finish, record.error, record.completion_tokens)


async def _score(
    options: QualityOptions, task: Task, answer: Answer, judge_client: LoadClient | None, runner: _CodeRunner
) -> list[Point]:
    checks = task.every_check if judge_client is None else checks_beside_judge(task)
    if not options.runs_code:
        checks = [check for check in checks if not isinstance(check, PythonRuns)]
    points = await score_answer(task, answer, runner, checks=checks)
    return points if judge_client is None else [*points, *await judge(judge_client, task, answer)]
