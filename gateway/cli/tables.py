"""Speaks to a running gateway's `/ops` for the command line, and lays what it says out for people."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table

LATEST = 5
"""Changes that `status` shows."""
VERDICTS = {"breaks": "breaks", "notices": "clients notice", "note": "note", "fine": "ok"}


def finding_lines(answer: Mapping[str, Any]) -> list[str]:
    """What a preflight found that is worth a word, the worst first; what is the same for several tiers once."""
    tiers: dict[tuple[str, str], list[str]] = {}
    for item in answer["findings"]:
        if item["words"]:
            tiers.setdefault((item["severity"], item["words"]), []).extend(
                [] if item["tier"] is None else [item["tier"]]
            )
    order = list(VERDICTS)
    lines = []
    for (severity, words), names in sorted(tiers.items(), key=lambda item: order.index(item[0][0])):
        whose = f"{'tiers' if len(names) > 1 else 'tier'} {', '.join(names)}: " if names else ""
        lines.append(f"{VERDICTS[severity]}: {whose}{words}")
    return lines


def show_preflight(answer: Mapping[str, Any], console: Console) -> None:
    """All that was compared as a table, and in words what differs."""
    table = Table("tier", "what", "verdict", "there", "now", box=box.SIMPLE_HEAD)
    for item in answer["findings"]:
        there = f"{item['backend']}: {item['value']}"
        now = f"{item['other']}: {item['other_value']}" if item["other"] else "-"
        table.add_row(item["tier"] or "-", item["what"].replace("_", " "), VERDICTS[item["severity"]], there, now)
    console.print(table, markup=False)
    for line in finding_lines(answer):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    verdict = "would break" if answer["breaks"] else "breaks nothing that was looked at"
    console.print(
        f"a switch to {answer['backend']} {verdict} (looked for {answer['seconds']:.1f} s)",
        highlight=False,
        markup=False,
    )


def show_status(status: Mapping[str, Any], console: Console) -> None:
    """Tiers with both sides, backends, and what was changed last."""
    console.print(Group(_tiers(status), _backends(status)))
    for name, tier in status["tiers"].items():
        if tier.get("guard"):
            console.print(_guard_line(name, tier["guard"]), soft_wrap=True, highlight=False, markup=False)
    history = status["rollout"]["history"]
    for change in history[:LATEST]:
        console.print(change_line(change), soft_wrap=True, highlight=False, markup=False)
    if len(history) > LATEST:
        console.print(f"and {len(history) - LATEST} changes before (gateway status --json)")
    reload = status.get("reload")
    if reload is not None and not (reload["ok"] and not reload["needs_restart"]):
        console.print("\n".join(_reload_lines(reload)), soft_wrap=True, highlight=False, markup=False)
    console.print(f"one `gateway rollback` leads to {status['rollout']['rollback_to']}", highlight=False)


def _reload_lines(reload: Mapping[str, Any]) -> list[str]:
    """What an operator has to know of the last time that the settings were reread."""
    at = reload["at"][:19].replace("T", " ")
    if not reload["ok"]:
        return [
            f"{at} the settings were reread and refused; the old ones stay:",
            *(f"  {reason}" for reason in reload["reasons"]),
        ]
    return [f"{at} the settings were reread; these need a restart:", *(f"  {line}" for line in reload["needs_restart"])]


def show_result(answer: Mapping[str, Any], console: Console) -> None:
    """What an order did."""
    lines = [change_line(answer["history"][0])] if answer["changed"] else ["nothing to change"]
    if answer["moved"]:
        lines.append(f"requests in line that moved along: {answer['moved']}")
    lines += [f"tier {name} stays: {reason}" for name, reason in answer["unmoved"].items()]
    lines += [
        f"{name}: {_assignment(item)}{' (pinned)' if item['pinned'] else ''}" for name, item in answer["tiers"].items()
    ]
    if answer["changed"] and not answer["persisted"]:
        lines.append("in force, but not kept: a restart goes back to LLM_BACKEND (see GATEWAY_STATE_FILE)")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def change_line(change: Mapping[str, Any]) -> str:
    moves = ", ".join(
        f"{tier} from {_assignment(move['from'])} to {_assignment(move['to'])}"
        for tier, move in change["tiers"].items()
    )
    why = f"; {change['why']}" if change.get("why") else ""
    return f"{change['at'][:19].replace('T', ' ')} {change['cause']}{' ' + change['by'] if change['by'] else ''}: {moves}{why}"


def _guard_line(tier: str, guard: Mapping[str, Any]) -> str:
    rule, worst = max(guard["rules"].items(), key=lambda item: float(item[1]["evidence"]))
    counts = f"{max(item['tested']['requests'] for item in guard['rules'].values())} requests so far"
    other = f"{guard['other']} before" if guard["is_switch"] else guard["other"]
    return f"guard: {tier} on {guard['tested']} compared with {other}, {counts}; nearest: {rule} {worst['evidence']:.2g} of {guard['needed']:.2g}"


def _assignment(position: Mapping[str, Any]) -> str:
    canary = position.get("canary")
    return str(position["backend"]) + (f" with {canary['percent']:g} % on {canary['backend']}" if canary else "")


def _tiers(status: Mapping[str, Any]) -> Table:
    table = Table(
        "tier",
        "backend",
        "serves",
        "share",
        "model",
        "first token p50",
        "p99",
        "answer p50",
        "p99",
        box=box.SIMPLE_HEAD,
    )
    for name, tier in status["tiers"].items():
        first = True
        for backend, role, share in _sides(tier):
            latency = tier["latency"][backend]
            times = [
                _seconds(latency[kind][share_of])
                for kind in ("time_to_first_token", "duration")
                for share_of in ("p50", "p99")
            ]
            table.add_row(name if first else "", backend, role, share, tier["models"][backend], *times)
            first = False
    return table


def _sides(tier: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Backend, part and counted share: who serves first, then the canary, then the others."""
    active, canary, share = tier["active_backend"], tier["canary"], tier["share"]
    counted = share["percent"] if share else None
    yield (
        active,
        "pinned" if tier["pinned"] else "active",
        "100 %" if canary is None else _percent(None if counted is None else 100 - counted),
    )
    if canary is not None:
        yield canary["backend"], f"canary {canary['percent']:g} %", _percent(counted)
    for backend in tier["models"]:
        if backend != active and (canary is None or backend != canary["backend"]):
            yield backend, "-", "-"


def _backends(status: Mapping[str, Any]) -> Table:
    table = Table("backend", "kind", "up", "running", "waiting", box=box.SIMPLE_HEAD)
    for name, backend in status["backends"].items():
        up = {True: "yes", False: "no"}.get(backend["up"], "not asked yet")
        table.add_row(
            name, backend["kind"], up, str(sum(backend["running"].values())), str(sum(backend["waiting"].values()))
        )
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _percent(value: float | None) -> str:
    return "no request yet" if value is None else f"{value:.1f} %"
