"""All checks of `gateway verify`, run one after the other against one server."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any

from gateway.bench.verify import (
    concurrency_check,
    dialect_checks,
    embedding_checks,
    error_checks,
    history_checks,
    korean_checks,
    server_checks,
    stream_checks,
    tool_checks,
)
from gateway.bench.verify.outcome import Check, CheckFailed, CheckSkipped, Group, Outcome, Reason
from gateway.bench.verify.target import ServerUnreachable, Target, shortened

CHECKS: tuple[Check, ...] = (
    *server_checks.CHECKS,
    *stream_checks.CHECKS,
    *korean_checks.CHECKS,
    *history_checks.CHECKS,
    *error_checks.CHECKS,
    *concurrency_check.CHECKS,
    *dialect_checks.CHECKS,
    *tool_checks.CHECKS,
    *embedding_checks.CHECKS,
)


class PreflightRefused(Exception):
    """The gateway refused the preflight check. `is_key` is true if it wants another key."""

    def __init__(self, text: str, *, is_key: bool) -> None:
        super().__init__(text)
        self.is_key = is_key


Preflight = Callable[[], Mapping[str, Any]]
"""Returns the gateway's preflight report; it blocks.

Raises:
    PreflightRefused: There is none.
"""


async def verify(target: Target, preflight: Preflight, groups: Collection[Group] = ()) -> AsyncIterator[Outcome]:
    """Run the checks of `groups`, or all, and yield each outcome.

    The checks of the server itself always run, and nothing else if it answers no chat.
    """
    for check in server_checks.REACH:
        outcome = await outcome_of(check, target)
        yield outcome
        if outcome.status == "failed":
            return
    for check in (*CHECKS, Check("preflight", "preflight", _preflight_check(preflight))):
        if not groups or check.group in groups:
            yield await outcome_of(check, target)


async def outcome_of(check: Check, target: Target) -> Outcome:
    """Run one check."""
    began = time.perf_counter()
    reason: Reason | None
    try:
        status, reason = "ok", await check.run(target)
    except CheckFailed as failure:
        status, reason = "failed", failure.reason
    except CheckSkipped as skip:
        status, reason = "skipped", skip.reason
    except ServerUnreachable as failure:
        status, reason = "failed", Reason("unreachable", {"message": str(failure)})
    except (LookupError, TypeError, AttributeError, ValueError) as problem:  # fields of another type than OpenAI's
        status, reason = "failed", Reason("odd_answer", {"problem": type(problem).__name__})
    return Outcome(check.group, check.name, status, reason, round(time.perf_counter() - began, 3))  # type: ignore[arg-type]


def _preflight_check(preflight: Preflight) -> Callable[[Target], Any]:
    async def run(target: Target) -> Reason:
        if target.kind != "gateway":
            raise CheckSkipped("not_a_gateway")
        try:
            report = await asyncio.to_thread(preflight)
        except PreflightRefused as refusal:
            if refusal.is_key:
                raise CheckSkipped("no_admin_key", message=shortened(str(refusal))) from None
            raise CheckFailed("preflight_refused", message=shortened(str(refusal))) from None
        backend = report["backend"]
        if report["breaks"]:
            broken = [
                f"{item['tier'] or '-'}: {item['words'] or item['what']}"
                for item in report["findings"]
                if item["severity"] == "breaks"
            ]
            raise CheckFailed("would_break", backend=backend, words=shortened("; ".join(broken), 400))
        return Reason("breaks_nothing", {"backend": backend})

    return run
