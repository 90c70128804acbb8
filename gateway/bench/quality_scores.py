"""Scores of quality tasks, and their comparison between two sides. Pure.

Every score is from 0 to 5. `accuracy`, `code_quality` and `clarity` are the share of points that the
task's checks gave, averaged over the repeats. `consistency` is the accuracy that every repeat reached,
divided by the accuracy that the best repeats reached, check by check: it says how much of what the model
can do it does each time, and is 0 for a model that never gets anything right. The total weighs them as
`WEIGHTS` says; a dimension that a task does not have is left out and the weights of the others grow.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

from gateway.bench.compare_statistics import Interval, paired, welch
from gateway.bench.quality_checks import Point
from gateway.bench.quality_tasks import Dimension, Scored

BEST = 5.0
WEIGHTS: dict[Dimension, float] = {"accuracy": 0.5, "consistency": 0.2, "code_quality": 0.15, "clarity": 0.15}
MOST_FAILURES = 0.1
"""Share of answers that may fail before a recommendation is withheld."""

Repeats = tuple[tuple[Point, ...], ...]


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Scores of one task on one side.

    Attributes:
        repeats: the points of each repeat's checks.
        failures: repeats without an answer, which score 0.
        cut: answers that reached `max_tokens`.
    """

    name: str
    scenario: str
    repeats: Repeats
    failures: int = 0
    cut: int = 0

    def dimension(self, name: Dimension) -> float | None:
        """Return the score, None if the task has no check for it (for consistency: fewer than two repeats)."""
        if name == "consistency":
            return _consistency(self.repeats)
        values = [value for points in self.repeats if (value := _share(points, name)) is not None]
        return BEST * sum(values) / len(values) if values else None

    @property
    def dimensions(self) -> dict[Dimension, float | None]:
        return {name: self.dimension(name) for name in WEIGHTS}

    @property
    def total(self) -> float | None:
        return _weighted(self.dimensions)

    @property
    def totals(self) -> list[float]:
        """The total of each repeat, with the consistency of all of them; their mean is `total`."""
        shared = self.dimension("consistency")
        found = []
        for points in self.repeats:
            own: dict[Dimension, float | None] = {"consistency": shared}
            for name in get_args(Scored):
                share = _share(points, name)
                own[name] = None if share is None else BEST * share
            if (total := _weighted(own)) is not None:
                found.append(total)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "scenario": self.scenario,
            "failures": self.failures,
            "cut": self.cut,
            "scores": {**self.dimensions, "total": self.total},
            "repeats": [
                [
                    {"kind": one.kind, "measures": one.measures, "points": one.points, "value": one.value}
                    for one in points
                ]
                for points in self.repeats
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError: it is something else.
        """
        repeats = tuple(tuple(Point(**point) for point in points) for points in value["repeats"])
        return cls(value["name"], value["scenario"], repeats, value["failures"], value["cut"])


@dataclass(frozen=True, slots=True)
class SideQuality:
    """All tasks on one side.

    Attributes:
        tasks_sha256: digest of the tasks and of how they were asked; equal for comparable sides.
        judge: model that graded, empty for none.
        guards: guards of the system that held while code ran; empty if none ran.
    """

    model: str
    tasks: tuple[TaskScore, ...]
    tasks_sha256: str
    repeats: int
    temperature: float
    judge: str = ""
    guards: Mapping[str, bool] | None = None

    @property
    def scenarios(self) -> list[str]:
        return list(dict.fromkeys(task.scenario for task in self.tasks))

    def of_scenario(self, name: str) -> list[TaskScore]:
        return [task for task in self.tasks if task.scenario == name]

    @property
    def asked(self) -> int:
        """Number of answers that were asked for."""
        return sum(len(task.repeats) for task in self.tasks)

    @property
    def failed(self) -> int:
        return sum(task.failures for task in self.tasks)

    @property
    def cut(self) -> int:
        """Number of answers that reached `max_tokens`."""
        return sum(task.cut for task in self.tasks)

    @property
    def failed_share(self) -> float:
        return self.failed / self.asked if self.asked else 1.0

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "tasks_sha256": self.tasks_sha256,
            "repeats": self.repeats,
            "temperature": self.temperature,
            "judge": self.judge,
            "guards": None if self.guards is None else dict(self.guards),
            "tasks": [task.to_json() for task in self.tasks],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            tasks = tuple(map(TaskScore.from_json, value["tasks"]))
            return cls(**{**value, "tasks": tasks})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a quality result: {error}") from error


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One scenario on both sides, or the mean of all (`scenario` is empty).

    `difference` is B minus A with its interval; None with one side alone.
    """

    scenario: str
    a: float | None
    b: float | None
    difference: Interval | None

    @property
    def better(self) -> str:
        """`A`, `B`, or empty if no difference was seen."""
        if self.difference is None or self.difference.crosses(0):
            return ""
        return "B" if self.difference.estimate > 0 else "A"


def rows(a: SideQuality | None, b: SideQuality | None) -> list[QualityRow]:
    """Return a row for each scenario, in the tasks' order, and the mean row."""
    shown = a or b
    if shown is None:
        return []
    found = [QualityRow(name, _mean(a, name), _mean(b, name), _difference(a, b, name)) for name in shown.scenarios]
    return [*found, QualityRow("", _mean(a, None), _mean(b, None), _mean_difference(a, b))]


def mean_dimension(side: SideQuality, name: Dimension) -> float | None:
    """Return the mean of one dimension over the tasks that have it."""
    return _average([value for task in side.tasks if (value := task.dimension(name)) is not None])


def recommendation(a: SideQuality | None, b: SideQuality | None) -> str:
    """Return the key of what can be recommended; never a side where only one was measured."""
    if a is None or b is None:
        return "quality_one_side"
    if a.tasks_sha256 != b.tasks_sha256:
        return "quality_unlike_tasks"
    if max(a.failed_share, b.failed_share) > MOST_FAILURES:
        return "quality_many_failures"
    return {"A": "quality_prefer_a", "B": "quality_prefer_b"}.get(rows(a, b)[-1].better, "quality_no_difference")


def _share(points: Sequence[Point], name: str) -> float | None:
    counted = [(point.points, point.value) for point in points if point.measures == name and point.value is not None]
    if not counted:
        return None
    return sum(weight * value for weight, value in counted) / sum(weight for weight, _ in counted)


def _consistency(repeats: Repeats) -> float | None:
    if len(repeats) < 2:
        return None
    columns = [
        [point.value for point in column if point.value is not None]
        for column in zip(*repeats, strict=True)
        if column[0].measures == "accuracy"
    ]
    weights = [point.points for point in repeats[0] if point.measures == "accuracy"]
    seen = [(weight, values) for weight, values in zip(weights, columns, strict=True) if values]
    if not seen:
        return None
    best = sum(weight * max(values) for weight, values in seen)
    return BEST * sum(weight * min(values) for weight, values in seen) / best if best else 0.0


def _weighted(scores: Mapping[Dimension, float | None]) -> float | None:
    seen = [(WEIGHTS[name], value) for name, value in scores.items() if value is not None]
    weight = sum(one for one, _ in seen)
    return sum(one * value for one, value in seen) / weight if weight else None


def _average(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean(side: SideQuality | None, scenario: str | None) -> float | None:
    """Return the mean of the scenario's tasks, or of all scenarios, each of which counts once."""
    if side is None:
        return None
    if scenario is None:
        return _average([value for name in side.scenarios if (value := _mean(side, name)) is not None])
    return _average([total for task in side.of_scenario(scenario) if (total := task.total) is not None])


def _difference(a: SideQuality | None, b: SideQuality | None, scenario: str) -> Interval | None:
    """Compare by Welch's interval over the repeats, each the mean of the scenario's tasks."""
    if a is None or b is None:
        return None
    return welch(_by_repeat(a, scenario), _by_repeat(b, scenario))


def _by_repeat(side: SideQuality, scenario: str) -> list[float]:
    columns = zip(*(task.totals for task in side.of_scenario(scenario)), strict=False)
    return [sum(column) / len(column) for column in columns]


def _mean_difference(a: SideQuality | None, b: SideQuality | None) -> Interval | None:
    """Compare by the paired interval over the tasks that both sides have.

    Each scenario weighs the same, as in the means, however many tasks it has.
    """
    if a is None or b is None:
        return None
    of_b = {task.name: task.total for task in b.tasks}
    pairs = [
        (task.scenario, total, other)
        for task in a.tasks
        if (total := task.total) is not None and (other := of_b.get(task.name)) is not None
    ]
    tasks = Counter(scenario for scenario, _, _ in pairs)
    return paired(
        [first for _, first, _ in pairs],
        [second for _, _, second in pairs],
        [1 / tasks[scenario] for scenario, _, _ in pairs],
    )
