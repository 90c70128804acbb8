"""Scores of one answer: each check gives a value from 0 to 1.

Pure, but for `score_answer`, which runs code in a child process.
"""

import ast
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema_rs

from gateway.bench.quality_sandbox import CodeRun, run_code
from gateway.bench.quality_style import style_score
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
    Scored,
    Structure,
    Style,
    Task,
    dimension,
)

_BLOCK = re.compile(r"^[ \t]*(?:```|~~~)([\w+#.-]*)[^\n]*\n(.*?)^[ \t]*(?:```|~~~)[ \t]*$", re.DOTALL | re.MULTILINE)
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_ITEM = re.compile(r"^\s*(?:#{1,6} |[-*+•] |\d{1,3}[.)] |\*\*[^*\n]+\*\*)", re.MULTILINE)
_PYTHON_NAMES = ("python", "py", "python3", "")
RUN_LENGTH = 8
"""Words of a run that `not_repetitive` looks for a second time."""
REPEATED_SHARE = 0.2
HANGUL_SHARE, FOREIGN_SHARE = 0.5, 0.01

Run = Callable[..., Awaitable[CodeRun]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a model.

    Attributes:
        finish: `stop`, `length`, or empty where the server does not say.
        error: kind of the failure; the answer then scores 0 in everything.
    """

    text: str
    finish: str = "stop"
    error: str = ""
    completion_tokens: int | None = None

    @property
    def visible(self) -> str:
        """The text without the reasoning that some servers leave in front of it."""
        return _THOUGHT.sub("", self.text).strip()


@dataclass(frozen=True, slots=True)
class Point:
    """A scored check: `value` from 0 to 1, None if it could not be carried out."""

    kind: str
    measures: Scored
    points: float
    value: float | None


async def score_answer(
    task: Task, answer: Answer, run: Run = run_code, *, checks: Sequence[Check] | None = None
) -> list[Point]:
    """Score `answer` by `checks` (default: every check of the task)."""
    scored = []
    for check in task.every_check if checks is None else checks:
        value = 0.0 if answer.error or not answer.visible else await _value(task, check, answer, run)
        scored.append(Point(_kind(check), dimension(check), check.points, value))
    return scored


def _kind(check: Check) -> str:
    return str(type(check).__struct_config__.tag)


async def _value(task: Task, check: Check, answer: Answer, run: Run) -> float | None:
    if isinstance(check, PythonRuns):
        return await _runs(check, answer.visible, run)
    return _CHECKS[type(check)](task, check, answer)


async def _runs(check: PythonRuns, text: str, run: Run) -> float | None:
    code = python_code(text)
    if code is None:
        return 0.0
    outcome = await run(f"{code}\n\n{check.before}", check.tests, seconds=check.seconds)
    return sum(outcome.results) / len(outcome.results) if outcome.results else 0.0


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of `text` as (language, content)."""
    return [(name.lower(), content) for name, content in _BLOCK.findall(text)]


_DEFINES = re.compile(r"^\s*(?:async def|def|class) ", re.MULTILINE)


def python_code(text: str) -> str | None:
    """Return the Python code of an answer, None if there is none that parses.

    It is the last fenced block that defines something, since what comes before may quote the question
    and what comes after may show the use; else the longest block, else the whole text if it defines something.
    """
    found = [content for name, content in blocks(text) if name in _PYTHON_NAMES and _parses(content)]
    if defining := [content for content in found if _DEFINES.search(content)]:
        return defining[-1]
    if found:
        return max(found, key=len)
    return text if _DEFINES.search(text) and _parses(text) else None


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def json_value(text: str) -> Any:
    """Return the JSON value of an answer: the whole text, or its first fenced block that parses.

    Raises:
        ValueError: there is none.
    """
    for candidate in (text, *(content for name, content in blocks(text) if name in ("json", ""))):
        try:
            return json.loads(candidate)
        except (ValueError, RecursionError):
            continue
    raise ValueError("no JSON")


def _json(task: Task, check: Any, answer: Answer) -> float:
    """Return 0 without JSON that fits the schema, else the share of parsing and of each value."""
    try:
        value = json_value(answer.visible)
    except ValueError:
        return 0.0
    if check.schema is not None and not jsonschema_rs.is_valid(check.schema, value):
        return 0.0
    right = [_at(value, path) == wanted for path, wanted in check.values.items()]
    return float((1 + sum(right)) / (1 + len(right)))


def _at(value: Any, path: str) -> Any:
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _mentions(task: Task, check: Any, answer: Answer) -> float:
    text = answer.visible
    found = [any(re.search(pattern, text, re.IGNORECASE) for pattern in point) for point in check.required]
    return float(sum(found) / len(found))


def _absent(task: Task, check: Any, answer: Answer) -> float:
    return float(not any(re.search(pattern, answer.visible, re.IGNORECASE) for pattern in check.patterns))


def _style(task: Task, check: Any, answer: Answer) -> float:
    code = python_code(answer.visible)
    return 0.0 if code is None else style_score(code)


def _fenced(task: Task, check: Any, answer: Answer) -> float:
    found = blocks(answer.visible)
    return (1.0 if any(name for name, _ in found) else 0.5) if found else 0.0


def _length(task: Task, check: Any, answer: Answer) -> float:
    return float(check.at_least <= len(answer.visible.split()) <= check.at_most)


def _structure(task: Task, check: Any, answer: Answer) -> float:
    return min(1.0, len(_ITEM.findall(answer.visible)) / float(check.items))


def _finished(task: Task, check: Any, answer: Answer) -> float | None:
    return float(answer.finish != "length") if answer.finish else None


def _not_repetitive(task: Task, check: Any, answer: Answer) -> float:
    words = answer.visible.split()
    runs = [tuple(words[place : place + RUN_LENGTH]) for place in range(len(words) - RUN_LENGTH + 1)]
    return float(not runs or 1 - len(set(runs)) / len(runs) <= REPEATED_SHARE)


def _language(task: Task, check: Any, answer: Answer) -> float:
    prose = _BLOCK.sub("", answer.visible)
    letters = [character for character in prose if character.isalpha()]
    if not letters:
        return 1.0  # code or figures alone
    hangul = sum("가" <= character <= "힣" or "ㄱ" <= character <= "ㆎ" for character in letters)
    latin = sum(character.isascii() for character in letters)
    foreign = sum(not character.isascii() and ord(character) >= 0x370 for character in letters) - hangul
    if task.language == "ko":
        wanted = hangul / len(letters) >= HANGUL_SHARE
    else:
        wanted, foreign = latin / len(letters) >= 1 - HANGUL_SHARE, foreign + hangul
    return float(wanted and foreign / len(letters) <= FOREIGN_SHARE)


_CHECKS: dict[type, Callable[[Task, Any, Answer], float | None]] = {
    JsonParses: _json,
    Mentions: _mentions,
    Absent: _absent,
    Style: _style,
    Fenced: _fenced,
    Length: _length,
    Structure: _structure,
    Finished: _finished,
    NotRepetitive: _not_repetitive,
    Language: _language,
}
