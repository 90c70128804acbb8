"""`gateway verify`: runs the checks, and prints a line for each as soon as it is known."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from gateway.bench.verify import report
from gateway.bench.verify.outcome import GROUPS, Group, Outcome
from gateway.bench.verify.target import Target
from gateway.bench.verify.texts import Language
from gateway.bench.verify.verification import PreflightRefused, verify
from gateway.cli.ops_client import OpsClient, OpsError


def run(
    ops: OpsClient,
    tier: str | None,
    preflight_seconds: float,
    model: str | None,
    api_key: str | None,
    *,
    users: int,
    only: str | None,
    timeout: float,
    language: Language,
    as_json: bool,
) -> bool:
    """Verify the server that `ops` is a client of, and return whether no check failed.

    Raises:
        ValueError: `only` names an unknown group.
    """
    groups = _groups(only)

    def preflight() -> Mapping[str, Any]:
        try:
            return ops.preflight(None, tier, preflight_seconds)
        except OpsError as error:
            raise PreflightRefused(str(error), is_key=error.status in (401, 403)) from None

    async def all_checks() -> tuple[Target, list[Outcome]]:
        outcomes: list[Outcome] = []
        async with Target(ops.base_url, model=model, key=api_key, seconds=timeout, users=users) as target:
            async for outcome in verify(target, preflight, groups):
                outcomes.append(outcome)
                if not as_json:
                    print(report.line(outcome, language), flush=True)
        return target, outcomes

    target, outcomes = asyncio.run(all_checks())
    if as_json:
        print(json.dumps(report.as_json(target, outcomes, language), ensure_ascii=False))
    else:
        print(report.heading(target, language))
        print(report.summary(outcomes, language))
    return all(outcome.status != "failed" for outcome in outcomes)


def _groups(text: str | None) -> list[Group]:
    names = [] if text is None else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise ValueError(f"--only: unknown group {unknown[0]!r}; expected some of {', '.join(GROUPS)}")
    return [group for group in GROUPS if group in names]
