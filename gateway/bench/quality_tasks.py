"""Quality tasks: prompts with the checks that score their answers, read from YAML."""

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema_rs
import msgspec
import yaml

Dimension = Literal["accuracy", "consistency", "code_quality", "clarity"]
Scored = Literal["accuracy", "code_quality", "clarity"]
"""Quality that a check measures; consistency follows from the accuracy of several repeats."""

BUILT_IN = Path(__file__).with_name("quality_tasks.yaml")

Patterns = Annotated[list[str], msgspec.Meta(min_length=1)]
Points = Annotated[float, msgspec.Meta(gt=0)]


class _Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """One check of an answer; `points` is its weight among the checks of the same dimension."""

    points: Points = 1.0
    measures: Scored | None = None


class PythonRuns(_Check, frozen=True, tag="python"):
    """The share of `tests` (Python expressions) that are true after the answer's code was executed."""

    tests: Annotated[list[str], msgspec.Meta(min_length=1)] = []
    before: str = ""
    seconds: Annotated[float, msgspec.Meta(gt=0, le=60)] = 5.0


class JsonParses(_Check, frozen=True, tag="json"):
    """The answer is JSON, alone or in a fenced block; then the share of `values` that it has.

    A key of `values` is a path such as `items.0.price`. `schema` is a JSON Schema.
    """

    values: dict[str, Any] = {}
    schema: dict[str, Any] | None = None


class Mentions(_Check, frozen=True, tag="mentions"):
    """The share of `required` points that the answer mentions.

    A point is a list of alternatives; each is a regular expression, matched without regard to case.
    """

    required: Annotated[list[Patterns], msgspec.Meta(min_length=1)] = []


class Absent(_Check, frozen=True, tag="absent"):
    """None of `patterns` is in the answer."""

    patterns: Patterns = []


class Style(_Check, frozen=True, tag="style"):
    """The share of the stated rules of style that the answer's Python code keeps."""


class Fenced(_Check, frozen=True, tag="fenced"):
    """Code is in a fenced block that names its language."""


class Length(_Check, frozen=True, tag="length"):
    """The number of words is within the bounds."""

    at_least: int = 0
    at_most: int = 1_000_000


class Structure(_Check, frozen=True, tag="structure"):
    """At least `items` headings or list items structure the text."""

    items: Annotated[int, msgspec.Meta(ge=1)] = 3


class Finished(_Check, frozen=True, tag="finished"):
    """The model ended the answer by itself, before `max_tokens`."""


class NotRepetitive(_Check, frozen=True, tag="not_repetitive"):
    """At most a fifth of the answer's runs of eight words occurred before in it."""


class Language(_Check, frozen=True, tag="language"):
    """The prose is in the task's language: letters of its script, without another language's characters."""


Check = (
    PythonRuns
    | JsonParses
    | Mentions
    | Absent
    | Style
    | Fenced
    | Length
    | Structure
    | Finished
    | NotRepetitive
    | Language
)
FACTS = (PythonRuns, JsonParses)
"""Checks that a program decides better than any judge."""
_DEFAULT_DIMENSION: dict[type, Scored] = {
    **dict.fromkeys((PythonRuns, JsonParses, Mentions, Absent), "accuracy"),
    Style: "code_quality",
}
_OF_EVERY_TASK: tuple[Check, ...] = (Finished(), NotRepetitive(), Language())


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt and how its answer is scored.

    Attributes:
        scenario: the row of the result table that the task counts for.
        criteria: what a good answer has, for a judge model; default: the required points of `checks`.
    """

    name: str
    prompt: str
    scenario: str
    checks: Annotated[list[Check], msgspec.Meta(min_length=1)]
    system: str = ""
    language: Literal["en", "ko"] = "en"
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] = 1024
    criteria: str = ""

    @property
    def every_check(self) -> list[Check]:
        """The task's own checks, then those of every task that it does not have itself."""
        return [*self.checks, *(one for one in _OF_EVERY_TASK if type(one) not in {type(own) for own in self.checks})]

    @property
    def has_code(self) -> bool:
        return any(isinstance(check, PythonRuns | Style) for check in self.checks)


class _TaskFile(msgspec.Struct, forbid_unknown_fields=True):
    tasks: Annotated[list[Task], msgspec.Meta(min_length=1)]


class TaskError(ValueError):
    """A file of tasks is not readable; the text says where."""


def dimension(check: Check) -> Scored:
    """Return what `check` measures."""
    return check.measures or _DEFAULT_DIMENSION.get(type(check), "clarity")


def built_in() -> list[Task]:
    """Return the tasks that come with the package."""
    return read_tasks(BUILT_IN)


def read_tasks(path: Path) -> list[Task]:
    """Read a YAML file of tasks.

    Raises:
        TaskError: the file cannot be read, or is not a list of tasks with checks.
    """
    try:
        tasks = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), _TaskFile).tasks
    except OSError as error:
        raise TaskError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: {error}") from error
    names = [task.name for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise TaskError(f"{path}: several tasks have the name {repeated[0]!r}")
    for task in tasks:
        for check in task.checks:
            _check_patterns(path, task, check)
            if problem := _problem(check):
                raise TaskError(f"{path}: task {task.name!r}: {problem}")
    return tasks


def _problem(check: Check) -> str | None:
    """Return why a check could never be carried out, or would always give 0; None if it can."""
    if isinstance(check, Mentions) and not check.required:
        return "a check 'mentions' needs 'required'"
    if isinstance(check, PythonRuns):
        if not check.tests:
            return "a check 'python' needs 'tests'"
        return next((f"{test!r} is not a Python expression" for test in check.tests if not _is_expression(test)), None)
    if isinstance(check, JsonParses) and check.schema is not None:
        try:
            jsonschema_rs.validator_for(check.schema)
        except (ValueError, TypeError, RecursionError):
            return "its 'schema' is not a JSON Schema"
    return None


def _is_expression(text: str) -> bool:
    try:
        ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _check_patterns(path: Path, task: Task, check: Check) -> None:
    patterns: Sequence[str] = ()
    if isinstance(check, Mentions):
        patterns = [one for point in check.required for one in point]
    elif isinstance(check, Absent):
        patterns = check.patterns
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise TaskError(f"{path}: task {task.name!r}: {pattern!r} is not a regular expression: {error}") from error
