"""Lines below the tables of `gateway top`: what is out of the ordinary, and what happened last."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from gateway.cli.tables import UNSHARED, change_line, gpu_lines, replicas_line, server_lines

MOST_SERVERS = MOST_ERRORS = 5
"""Lines about servers and about failed requests."""
MOST_LIMITS = 3
"""Shared limits that are shown: the fullest ones in use."""
MOST_LINES = 3
"""Lines that one text may take."""
NO_BREAK = "\N{NO-BREAK SPACE}"


class Note(NamedTuple):
    """One line. It is cut where the terminal ends."""

    text: str
    style: str = ""


def notes(status: Mapping[str, Any], width: int) -> Iterator[Note]:
    """Yield the lines for `status` in `width` columns, the most urgent first."""
    yield from _gpu(status["rollout"].get("gpu"), width)
    yield from _replicas(status, width)
    lines = list(server_lines(status))
    for line in lines[:MOST_SERVERS]:
        yield Note(line, "yellow")
    if len(lines) > MOST_SERVERS:
        yield Note(f"and {len(lines) - MOST_SERVERS} more servers (see gateway status)", "yellow")
    unserved = status["ready"]["unserved_tiers"]
    if unserved:
        yield Note(f"tiers that cannot be served now: {', '.join(unserved)}", "bold red")
    history: Sequence[Mapping[str, Any]] = status["rollout"]["history"]
    if history:
        yield Note(f"last change: {change_line(history[0])}")
    yield from _errors(status["errors"])


def _gpu(gpu: Mapping[str, Any] | None, width: int) -> Iterator[Note]:
    if gpu is None:
        return
    style = {"ready": "", "failed": "bold red"}.get(gpu["phase"], "yellow")
    for line in gpu_lines(gpu):
        yield from _wrapped(line, width, style)


def _replicas(status: Mapping[str, Any], width: int) -> Iterator[Note]:
    processes = status.get("processes")
    if processes is not None:
        items = [_process(process).replace(" ", NO_BREAK) for process in processes]
        is_whole = all(process["status"] == "ready" for process in processes)
        yield from _wrapped(f"replicas on this machine: {'; '.join(items)}", width, "" if is_whole else "yellow")
    replicas = status.get("replicas")
    if replicas is not None:
        is_shared = replicas["up"] and replicas["sharing"] == replicas["replicas"]
        yield from _wrapped(replicas_line(replicas), width, "" if is_shared else "bold red")
        yield from _limits(replicas["limits"])
    if status["rollout"].get("shared") is False:
        yield from _wrapped(UNSHARED, width, "bold red")


def _process(process: Mapping[str, Any]) -> str:
    running, waiting = sum(process["running"].values()), sum(process["waiting"].values())
    state = "" if process["status"] == "ready" else f" {process['status']}"
    return f"#{process['replica']}{state} {running} run {waiting} wait"


def _limits(limits: Sequence[Mapping[str, Any]]) -> Iterator[Note]:
    used = sorted((limit for limit in limits if limit["running"]), key=lambda limit: limit["running"] - limit["share"])
    for limit in used[::-1][:MOST_LIMITS]:
        figures = f"{limit['running']} run here, share {limit['share']} of {limit['limit']}"
        yield Note(f"{figures}: {limit['name']}", "yellow" if limit["running"] >= limit["share"] else "")


def _wrapped(text: str, width: int, style: str) -> Iterator[Note]:
    for line in textwrap.wrap(text, max(width, 20), max_lines=MOST_LINES, placeholder=" …", subsequent_indent="  "):
        yield Note(line.replace(NO_BREAK, " "), style)


def _errors(errors: Sequence[Mapping[str, Any]]) -> Iterator[Note]:
    for error in errors[:MOST_ERRORS]:
        at = datetime.fromisoformat(error["at"]).astimezone().strftime("%H:%M:%S")
        why = " ".join(dict.fromkeys(text for text in (error["code"], error["reason"]) if text))
        place = " on ".join(name for name in (error["tier"], error["backend"]) if name != "none")
        line = f"{at} {error['status']} {why}{': ' if place else ''}{place}, {error['request_id']}"
        yield Note(line, "dim" if error["outcome"] == "client_error" else "red")
