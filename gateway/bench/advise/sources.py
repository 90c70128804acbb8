"""Sources of `gateway advise`: the metrics of a gateway, or a file with the result of a benchmark."""

import json
from pathlib import Path

from gateway.bench.advise.advice import Remark
from gateway.bench.advise.cost import Cost, Machine, cost_of
from gateway.bench.result_json import from_json
from gateway.bench.results import ScenarioResult

USERS_FIGURES = ("users_realtime", "users_within_wait", "users_at_most")


class InvalidSource(ValueError):
    """A source that cannot be read; the text says why."""


def result_of(path: Path) -> ScenarioResult:
    """Read the result of a benchmark: a file, or the folder of `--out`.

    Raises:
        InvalidSource: it cannot be read, or is not a result.
    """
    file = path / "benchmark_results.json" if path.is_dir() else path
    try:
        return from_json(json.loads(file.read_text("utf-8")))
    except OSError as problem:
        raise InvalidSource(f"{file}: {problem.strerror or problem}") from None
    except ValueError as problem:
        raise InvalidSource(f"{file}: {problem}") from None


def kind_of(result: ScenarioResult) -> str:
    """Return the kind of the measured server, `openai` if the result does not tell."""
    kind = str(result.server.get("kind") or "")
    return "ollama" if result.api == "ollama" else kind if kind in ("ollama", "vllm") else "openai"


def users_of(result: ScenarioResult) -> int | None:
    """Return how many users at once a result found: in real time, or else within the wait, or at most."""
    return next((value for name in USERS_FIGURES if (value := _users(result, name))), None)


def users_of_both(result: ScenarioResult, before: ScenarioResult) -> tuple[int | None, int | None]:
    """Return how many users at once two results found by the same criterion, as `users_of`."""
    for name in USERS_FIGURES:
        if (users := _users(result, name)) and (earlier := _users(before, name)):
            return users, earlier
    return users_of(result), None


def _users(result: ScenarioResult, name: str) -> int:
    value = result.figures.get(name)
    return value if isinstance(value, int) else 0


def cost_remarks(
    users: int | None, machine: Machine | None, before: int | None, *, is_compared: bool = False
) -> list[Remark]:
    """Return the lines about the cost; none if nobody asked for them.

    `is_compared` tells whether there is a result before; without `before`, it has no users to compare.
    """
    missing = [Remark("no_share", {}, "computed")] if is_compared and before is None else []
    if machine is None and before is None:
        return missing
    cost: Cost | None = None if users is None else cost_of(users, machine, before)
    if cost is None:
        return [Remark("no_users", {}, "computed")]
    remarks = missing
    if cost.monthly is not None:
        remarks.append(Remark("cost_month", {"monthly": cost.monthly}, "computed"))
        remarks.append(Remark("cost_user", {"per_user": cost.per_user, "users": cost.users}, "computed"))
    if cost.share is not None:
        remarks.append(Remark("cost_share", {"share": cost.share, "before": before, "users": cost.users}, "computed"))
    return remarks
