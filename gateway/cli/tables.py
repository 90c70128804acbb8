"""Tables and lines in which the command line shows what `/ops` of a gateway answers."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table

LATEST = 5
"""Number of changes that `status` shows."""
OUTCOMES = {"failed": "failed", "reversed": "was reversed", "done": "is done"}
UNSHARED = "this replica and the others do not know of each other's changes: Redis does not answer"
VERDICTS = {"breaks": "breaks", "notices": "clients notice", "note": "note", "fine": "ok"}


def finding_lines(answer: Mapping[str, Any]) -> list[str]:
    """Return the findings of a preflight check that have words, the most severe first.

    A finding that is the same for several tiers is one line.
    """
    tiers: dict[tuple[str, str], list[str]] = {}
    for item in answer["findings"]:
        if item["words"]:
            tiers.setdefault((item["severity"], item["words"]), []).extend(
                [] if item["tier"] is None else [item["tier"]]
            )
    order = list(VERDICTS)
    lines = []
    for (severity, words), names in sorted(tiers.items(), key=lambda item: order.index(item[0][0])):
        prefix = f"{'tiers' if len(names) > 1 else 'tier'} {', '.join(names)}: " if names else ""
        lines.append(f"{VERDICTS[severity]}: {prefix}{words}")
    return lines


def show_preflight(answer: Mapping[str, Any], console: Console) -> None:
    """Print all findings as a table, and those that have words as lines."""
    table = Table("tier", "check", "verdict", "new", "current", box=box.SIMPLE_HEAD)
    for item in answer["findings"]:
        new = f"{item['backend']}: {item['value']}"
        current = f"{item['other']}: {item['other_value']}" if item["other"] else "-"
        table.add_row(item["tier"] or "-", item["what"].replace("_", " "), VERDICTS[item["severity"]], new, current)
    console.print(table, markup=False)
    for line in finding_lines(answer):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    verdict = "would break a tier" if answer["breaks"] else "breaks nothing that was checked"
    console.print(
        f"a switch to {answer['backend']} {verdict} (the check took {answer['seconds']:.1f} s)",
        highlight=False,
        markup=False,
    )


def show_status(status: Mapping[str, Any], console: Console) -> None:
    """Print the tiers with their backends, the backends, and the last changes."""
    console.print(Group(_tiers(status), _backends(status)))
    for line in server_lines(status):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for name, tier in status["tiers"].items():
        if tier.get("guard"):
            console.print(_guard_line(name, tier["guard"]), soft_wrap=True, highlight=False, markup=False)
    history = status["rollout"]["history"]
    for change in history[:LATEST]:
        console.print(change_line(change), soft_wrap=True, highlight=False, markup=False)
    if len(history) > LATEST:
        console.print(f"and {len(history) - LATEST} earlier changes (see gateway status --json)")
    reload = status.get("reload")
    if reload is not None and not (reload["ok"] and not reload["needs_restart"]):
        console.print("\n".join(_reload_lines(reload)), soft_wrap=True, highlight=False, markup=False)
    if status["rollout"].get("shared") is False:
        console.print(UNSHARED)
    replicas = status.get("replicas")
    if replicas is not None:
        console.print(replicas_line(replicas), soft_wrap=True, highlight=False, markup=False)
    for line in process_lines(status.get("processes") or ()):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    gpu = status["rollout"].get("gpu")
    if gpu is not None:
        for line in gpu_lines(gpu):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"`gateway rollback` leads to {status['rollout']['rollback_to']}", highlight=False)


def replicas_line(replicas: Mapping[str, Any]) -> str:
    """Return how many replicas share the limits, or since when this one is alone."""
    if replicas["sharing"] == replicas["replicas"] and replicas["up"]:
        return f"replicas that share the limits: {replicas['replicas']}, through Redis at {replicas['redis']}"
    if replicas["up"]:
        return f"Redis at {replicas['redis']} answers again; the limits are shared within seconds"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(replicas["since"]))
    return (
        f"the limits are not shared: Redis at {replicas['redis']} is not reachable since {since} UTC "
        f"({replicas['reason'] or 'not yet connected'}); this replica goes on with 1/{replicas['replicas']} of each"
    )


def process_lines(processes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each of the replicas on the gateway's machine."""
    for process in processes:
        running, waiting = sum(process["running"].values()), sum(process["waiting"].values())
        yield (
            f"replica {process['replica']} (process {process['pid']}): {process['status']}, "
            f"{running} requests run, {waiting} wait"
        )


def gpu_lines(gpu: Mapping[str, Any]) -> Iterator[str]:
    """Yield the state of the GPU that the engines share, and what a rollback would take."""
    if gpu["holder"] is not None and gpu["to"] is None:
        yield f"GPU: {gpu['holder']} has had it since {gpu['since'][:19].replace('T', ' ')}"
    else:
        yield f"GPU: {switch_line(gpu)}"
    last = gpu["last"]
    if last is not None and last["outcome"] != "done":
        yield f"GPU: the switch to {last['to']} at {last['at'][:19].replace('T', ' ')} {OUTCOMES[last['outcome']]}" + (
            f": {last['why']}" if last["why"] else ""
        )
    rollback = gpu["rollback"]
    if rollback["basis"] == "none" and gpu["holder"] == rollback["to"]:
        return
    took = (
        "an unknown time" if rollback["seconds"] is None else f"about {rollback['seconds']:.1f} s ({rollback['basis']})"
    )
    yield f"GPU: a rollback would take {took}"


def switch_line(gpu: Mapping[str, Any]) -> str:
    """Return the progress of a switch in one line."""
    left = gpu["expected_seconds"]
    expected = "" if left is None else f", about {left:.0f} s to go"
    source = f" from {gpu['from']}" if gpu["from"] else ""
    target = f" to {gpu['to']}" if gpu["to"] else ""
    return (
        f"{gpu['phase']}{source}{target} for {gpu['seconds']:.0f} s{expected}; "
        f"{gpu['running']} requests still run, {gpu['waiting']} wait"
    )


def _reload_lines(reload: Mapping[str, Any]) -> list[str]:
    """Return why reread settings were refused, or which changes need a restart."""
    at = reload["at"][:19].replace("T", " ")
    if not reload["ok"]:
        return [
            f"{at} the settings were reread and refused; the old ones stay in force:",
            *(f"  {reason}" for reason in reload["reasons"]),
        ]
    return [f"{at} the settings were reread; these need a restart:", *(f"  {line}" for line in reload["needs_restart"])]


def show_result(answer: Mapping[str, Any], console: Console) -> None:
    """Print what a change of the roll-out did."""
    lines = [change_line(answer["history"][0])] if answer["changed"] else ["nothing changed"]
    if answer["moved"]:
        lines.append(f"queued requests that migrated: {answer['moved']}")
    lines += [f"tier {name} stays where it is: {reason}" for name, reason in answer["unmoved"].items()]
    lines += [
        f"{name}: {_assignment(item)}{' (pinned)' if item['pinned'] else ''}" for name, item in answer["tiers"].items()
    ]
    if answer["changed"] and not answer["persisted"] and not answer.get("shared"):
        lines.append(
            "the change is in force but not saved: after a restart LLM_BACKEND applies again (see GATEWAY_STATE_FILE)"
        )
    if answer.get("shared") is False:
        lines.append("the other replicas have not been told, since Redis does not answer; they follow when it does")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def change_line(change: Mapping[str, Any]) -> str:
    """Return one line for a change: its time, its cause, and the moves of the tiers."""
    moves = ", ".join(
        f"{tier} from {_assignment(move['from'])} to {_assignment(move['to'])}"
        for tier, move in change["tiers"].items()
    )
    at, by = change["at"][:19].replace("T", " "), f" {change['by']}" if change["by"] else ""
    by += f" on {change['replica']}" if change.get("replica") else ""
    why = f"; {change['why']}" if change.get("why") else ""
    return f"{at} {change['cause']}{by}: {moves}{why}"


def _guard_line(tier: str, guard: Mapping[str, Any]) -> str:
    rule, worst = max(guard["rules"].items(), key=lambda item: float(item[1]["evidence"]))
    requests = max(item["tested"]["requests"] for item in guard["rules"].values())
    other = f"{guard['other']} before" if guard["is_switch"] else guard["other"]
    return (
        f"guard: {tier} on {guard['tested']} compared with {other}, {requests} requests so far; "
        f"strongest evidence: {rule} {worst['evidence']:.2g} of {guard['needed']:.2g} needed"
    )


def _assignment(assignment: Mapping[str, Any]) -> str:
    canary = assignment.get("canary")
    return str(assignment["backend"]) + (f" with {canary['percent']:g} % on {canary['backend']}" if canary else "")


def _tiers(status: Mapping[str, Any]) -> Table:
    table = Table(
        "tier", "backend", "role", "share", "model", "first token p50", "p99", "answer p50", "p99", box=box.SIMPLE_HEAD
    )
    for name, tier in status["tiers"].items():
        first = True
        for backend, role, share in _sides(tier):
            latency = tier["latency"][backend]
            times = [
                _seconds(latency[kind][quantile])
                for kind in ("time_to_first_token", "duration")
                for quantile in ("p50", "p99")
            ]
            table.add_row(name if first else "", backend, role, share, tier["models"][backend], *times)
            first = False
    return table


def _sides(tier: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield backend, role and measured share: first the active backend, then the canary."""
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
        up = {True: "yes", False: "no"}.get(backend["up"], "not probed yet")
        if backend.get("state", "awake") != "awake":
            up = backend["state"]
        table.add_row(
            name, backend["kind"], up, str(sum(backend["running"].values())), str(sum(backend["waiting"].values()))
        )
    return table


def server_lines(status: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each server that does not get all requests, and for each name that is not resolved."""
    for backend in status["backends"].values():
        for name in backend.get("names", ()):
            if not name["resolved"]:
                rest = f"its last {name['servers']} servers are used" if name["servers"] else "it has no servers"
                yield f"host name {name['name']}: not resolved ({name['failure']}); {rest}"
        for server in backend.get("leaving", ()):
            yield f"server {server['name']}: leaving, {server['running']} requests run there"
        for server in backend["servers"]:
            if server["circuit"] != "closed":
                yield f"server {server['name']}: circuit {server['circuit']}"
            for ejection in server.get("ejections", ()):
                what = f"{ejection['model']} ({ejection['lane']})"
                if ejection["state"] == "trial":
                    when = "on trial, with one request at a time"
                else:
                    when = f"until {ejection['until'][:19].replace('T', ' ')}"
                    if ejection["gets_requests"]:
                        when += "; it gets requests that no other server can serve"
                yield f"server {server['name']}: ejected for {what}, {ejection['reason']}; {when}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _percent(value: float | None) -> str:
    return "no request yet" if value is None else f"{value:.1f} %"
