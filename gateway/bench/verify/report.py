"""Report of `gateway verify`: a line for each check, or JSON."""

from collections.abc import Sequence
from typing import Any

from gateway.bench.verify.outcome import Outcome
from gateway.bench.verify.target import Target
from gateway.bench.verify.texts import Language, said


def line(outcome: Outcome, language: Language) -> str:
    """Return the line of one check: its outcome, its group and name, and the reason."""
    status, group, name = (
        said(f"{kind}.{key}", language)
        for kind, key in (("status", outcome.status), ("group", outcome.group), ("check", outcome.name))
    )
    reason = f" ({outcome.reason.said(language)})" if outcome.reason else ""
    return f"{status:8}{group}: {name}{reason}"


def summary(outcomes: Sequence[Outcome], language: Language) -> str:
    seconds = sum(outcome.seconds for outcome in outcomes)
    return said("summary", language, **counts(outcomes), seconds=seconds)


def heading(target: Target, language: Language) -> str:
    kind = said(f"kind.{target.kind}", language)
    return said("heading", language, url=target.base_url, kind=kind, model=target.model)


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return {
        status: sum(1 for outcome in outcomes if outcome.status == status) for status in ("ok", "failed", "skipped")
    }


def as_json(target: Target, outcomes: Sequence[Outcome], language: Language) -> dict[str, Any]:
    return {
        "url": target.base_url,
        "kind": target.kind,
        "model": target.model,
        **counts(outcomes),
        "checks": [
            {
                "group": outcome.group,
                "check": outcome.name,
                "status": outcome.status,
                "reason": outcome.reason.key if outcome.reason else None,
                "values": outcome.reason.values if outcome.reason else {},
                "text": outcome.reason.said(language) if outcome.reason else "",
                "seconds": outcome.seconds,
            }
            for outcome in outcomes
        ],
    }
