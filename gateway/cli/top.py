"""`gateway top`: the status of a running gateway in a terminal, refreshed each second."""

import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gateway.cli.ops_client import OpsClient, OpsError
from gateway.cli.top_notes import Note, notes

PATIENCE = 5.0
"""Seconds to wait for the gateway before it counts as lost."""
WIDTH_WITH_MODELS = 110
"""Columns from which the models of the tiers have room."""
HEADING = 2
"""Lines above the rows of a table."""
BLOCKS = "▁▂▃▄▅▆▇█"
NONE = "-"

Wait = Callable[[float], bool]
"""Waits for a number of seconds, or until the user wants to leave; returns True in that case."""


def run(client: OpsClient, console: Console, interval: float, *, is_once: bool) -> None:
    """Show the status until the user leaves with q or Ctrl-C.

    With `is_once`, or where the output is not a terminal, show it once.

    Raises:
        OpsError: the gateway cannot be reached at the start, or it refuses.
    """
    status = client.request("GET", "/ops/status", seconds=PATIENCE)
    if is_once or not console.is_terminal:
        if not _is_fresh(status):
            time.sleep(status["live"]["step"] + 0.1)
            status = client.request("GET", "/ops/status", seconds=PATIENCE)
        console.print(frame(status, client.base_url, console.width, None))
        return
    with _leaving_by_key() as wait, Live(console=console, screen=True, auto_refresh=False) as live:
        problem: str | None = None
        while True:
            live.update(frame(status, client.base_url, console.width, console.height, problem), refresh=True)
            if wait(interval):
                return
            try:
                status, problem = client.request("GET", "/ops/status", seconds=PATIENCE), None
            except OpsError as error:
                problem = str(error)


def _is_fresh(status: Mapping[str, Any]) -> bool:
    """Return whether the figures are current. The gateway takes no samples in quiet times."""
    taken = status["series"]["at"]
    return bool(taken) and time.time() - float(taken[-1]) < 2 * float(status["live"]["step"])


@contextmanager
def _leaving_by_key() -> Iterator[Wait]:
    """Read keys without waiting for Enter, and end at SIGTERM as at q, so that the screen is restored."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        if not sys.stdin.isatty():
            yield _sleep
            return
        terminal = sys.stdin.fileno()
        settings = termios.tcgetattr(terminal)
        try:
            tty.setcbreak(terminal)
            yield _wait_for_q
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, settings)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _wait_for_q(seconds: float) -> bool:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        ready, _, _ = select.select([sys.stdin], [], [], left)
        if ready:
            key = sys.stdin.read(1)
            if key in ("q", "Q", ""):  # empty: the terminal is gone
                return True
    return False


# The frame


def frame(
    status: Mapping[str, Any], base_url: str, width: int, height: int | None, problem: str | None = None
) -> RenderableType:
    """Return what is shown for `status` in `width` columns, and in `height` lines if there is a limit.

    `problem` says why the status is not current.
    """
    state = str(status["ready"]["status"])
    head = Text(f"LLM gateway {status['version']}  {base_url}  {time.strftime('%H:%M:%S')}  ", style="bold")
    head.append(state, style="green" if state == "ready" else "yellow")
    above: list[RenderableType] = [_line(head)]
    if problem is not None:
        above.append(_line(Text(f"not current: {problem}", style="bold red")))
    below: list[RenderableType] = [Text(""), *(_shown(note) for note in notes(status, width))]
    if height is not None:
        below.append(_line(Text("q or Ctrl-C leaves", style="dim")))
    backends = _backends(status)
    used = len(above) + len(below) + backends.row_count + 2 * HEADING + 1
    return Group(*above, backends, _tiers(status, width, None if height is None else height - used), *below)


def _shown(note: Note) -> Text:
    return _line(Text(note.text, style=note.style))


def _line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _backends(status: Mapping[str, Any]) -> Table:
    table = _table("backend", "", "tokens/s", "req/s", "err/s", "TTFT p50/p95", "ITL p50/p95", "run", "wait")
    for name, backend in status["backends"].items():
        live = backend["live"]
        word = _state(backend)
        waiting = sum(backend["waiting"].values())
        table.add_row(
            Text(name, overflow="ellipsis"),
            Text(word, style={"up": "green", "down": "bold red"}.get(word, "yellow")),
            _rate(live["tokens"]),
            _rate(live["requests"]),
            Text(_rate(live["errors"]), style="red" if live["errors"] else ""),
            *_latencies(live),
            str(sum(backend["running"].values())),
            Text(str(waiting), style="yellow" if waiting else ""),
        )
        course = status["series"]["backends"].get(name, {}).get("tokens", [])
        if any(course):
            table.add_row("", "", Text(_sparkline(course, 8), style="cyan"))
    return table


def _state(backend: Mapping[str, Any]) -> str:
    """Return the state of a backend in one word, or how many of its servers are well."""
    if backend.get("state", "awake") != "awake":
        return str(backend["state"])
    servers = backend["servers"]
    if not backend["up"] or not servers:
        return "down"
    troubles = [trouble for server in servers if (trouble := _trouble(server))]
    if not troubles:
        return "up"
    return troubles[0] if len(servers) == 1 else f"{len(servers) - len(troubles)}/{len(servers)}"


def _trouble(server: Mapping[str, Any]) -> str:
    """Return why a server does not get all requests; empty if it does."""
    if server["ejections"]:
        return "ejected"
    if server["gets_requests"]:
        return ""
    return "down" if not server["up"] else "paused" if server["paused"] else str(server["circuit"])


def _tiers(status: Mapping[str, Any], width: int, height: int | None) -> RenderableType:
    columns = ["tier", "backend", "share", "tokens/s", "req/s", "TTFT p50/p95", "ITL p50/p95"]
    has_models = width >= WIDTH_WITH_MODELS
    table = _table(*columns, *(["model"] if has_models else []))
    tiers = sorted(
        status["tiers"].items(), key=lambda item: -sum(live["requests"] for live in item[1]["live"].values())
    )
    shown = rows = 0
    for name, tier in tiers:
        sides = list(_sides(tier))
        if height is not None and shown and rows + len(sides) > height:
            break
        for number, (backend, share) in enumerate(sides):
            live = tier["live"][backend]
            model = [Text(tier["models"][backend], overflow="ellipsis", style="dim")] if has_models else []
            table.add_row(
                Text("" if number else name, overflow="ellipsis"),
                Text(backend, overflow="ellipsis"),
                share,
                _rate(live["tokens"]),
                _rate(live["requests"]),
                *_latencies(live),
                *model,
            )
        shown, rows = shown + 1, rows + len(sides)
    left = len(tiers) - shown
    return Group(table, _line(Text(f"and {left} more tiers with less traffic", style="dim"))) if left else table


def _sides(tier: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the backends that serve a tier or have traffic of it, with their share."""
    canary = tier["canary"]
    percent = canary["percent"] if canary else 0
    yield tier["active_backend"], "pinned" if tier["pinned"] else f"{100 - percent:g} %"
    if canary:
        yield canary["backend"], f"{percent:g} %"
    for backend, live in tier["live"].items():
        if backend not in (tier["active_backend"], canary and canary["backend"]) and live["requests"]:
            yield backend, "leaving"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        is_name = column in ("tier", "backend", "model", "")
        table.add_column(
            column,
            justify="left" if is_name else "right",
            no_wrap=True,
            max_width=16 if column in ("tier", "backend") else None,
            overflow="ellipsis",
        )
    return table


def _latencies(live: Mapping[str, float | None]) -> tuple[str, str]:
    return (
        _pair(live["time_to_first_token_p50"], live["time_to_first_token_p95"]),
        _pair(live["inter_token_latency_p50"], live["inter_token_latency_p95"]),
    )


def _pair(low: float | None, high: float | None) -> str:
    return NONE if low is None or high is None else f"{_short(low)}/{_short(high)}"


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.0f}ms" if seconds < 1 else f"{seconds:.1f}s" if seconds < 100 else f"{seconds:.0f}s"


def _rate(value: float) -> str:
    return f"{value:.1f}" if 0 < value < 10 else f"{value:.0f}"


def _sparkline(values: Sequence[float], width: int) -> str:
    """Return the last `width` values as blocks, relative to the highest of them."""
    last = list(values)[-width:]
    top = max(last) or 1
    return "".join(BLOCKS[round(value / top * (len(BLOCKS) - 1))] for value in last)
