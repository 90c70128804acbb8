"""The recording of a gateway's traffic, read for a replay. The format is that of `gateway.telemetry.recording`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import msgspec

from gateway.bench.quantiles import quantile
from gateway.telemetry.exchange import CHAT, WORKLOADS
from gateway.telemetry.recording import FORMAT, OLDER, VERSION, RecordedExchange

REPLAYED = frozenset(endpoint for endpoint, workload in WORKLOADS.items() if workload == CHAT) - {"count_tokens"}
"""Endpoints whose requests are sent again, all as chats."""
DEFAULT_TOKENS_PER_CHARACTER = 0.25
DEFAULT_COMPLETION = 128

_decode = msgspec.json.Decoder(RecordedExchange).decode


class InvalidRecording(ValueError):
    """A file that is not a recording; the message names it."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Exchanges in the order of their arrival.

    Attributes:
        skipped: numbers of those that a replay does not send, by endpoint.
        unreadable: number of lines that could not be read.
    """

    exchanges: tuple[RecordedExchange, ...] = field(repr=False)
    skipped: dict[str, int]
    unreadable: int = 0

    @property
    def seconds(self) -> float:
        """Time from the first arrival to the last."""
        return self.exchanges[-1].at - self.exchanges[0].at

    @property
    def good(self) -> list[RecordedExchange]:
        return [exchange for exchange in self.exchanges if exchange.outcome == "ok"]

    @property
    def failed(self) -> int:
        """Number of requests that got no answer: not those that the client left or that were wrong."""
        return sum(exchange.outcome not in ("ok", "client_error", "cancelled") for exchange in self.exchanges)

    @property
    def tokens_per_character(self) -> float:
        """Prompt tokens for each character, as the recorded backend counted them, without images."""
        counted = [item for item in self.exchanges if item.prompt_tokens and not item.images]
        characters = sum(item.characters for item in counted)
        return (
            sum(item.prompt_tokens or 0 for item in counted) / characters
            if characters
            else DEFAULT_TOKENS_PER_CHARACTER
        )

    @property
    def usual_completion(self) -> int:
        """Median length of the answers in tokens: for requests that were refused, left or not counted."""
        counts = [item.completion_tokens for item in self.good if item.completion_tokens]
        return round(median(counts)) if counts else DEFAULT_COMPLETION

    def milliseconds(self, metric: str, percentile: float) -> float | None:
        """Return a percentile of `ttft` (of streams) or `e2el`; None without values."""
        values: Iterable[float | None] = (
            (item.time_to_first_token for item in self.good if item.stream)
            if metric == "ttft"
            else (item.duration for item in self.good)
        )
        found = quantile([value for value in values if value is not None], percentile)
        return None if found is None else found * 1000

    def count(self, metric: str) -> int:
        """Return the number of values that `milliseconds` has."""
        if metric == "ttft":
            return sum(item.stream and item.time_to_first_token is not None for item in self.good)
        return len(self.good)


def read_recording(path: Path, most: int | None = None) -> Recording:
    """Read a recording, and the file before it if there is one; at most the first `most` requests.

    Raises:
        InvalidRecording: it cannot be read, is of another format, or has no request to send.
    """
    older = path.with_name(path.name + OLDER)
    found: list[RecordedExchange] = []
    unreadable = 0
    for file in (older, path) if older.exists() else (path,):
        read, broken = _read(file)
        found += read
        unreadable += broken
    sent = sorted((item for item in found if _is_replayed(item)), key=lambda item: item.at)
    if not sent:
        raise InvalidRecording(f"{path}: no request that can be sent again")
    skipped = Counter(item.endpoint for item in found if not _is_replayed(item))
    return Recording(tuple(sent[:most]), dict(skipped), unreadable)


def _is_replayed(item: RecordedExchange) -> bool:
    """Return whether an exchange is a chat with a prompt; Ollama's loading of a model has none."""
    return item.endpoint in REPLAYED and bool(item.characters or item.prompt_tokens)


def _read(file: Path) -> tuple[list[RecordedExchange], int]:
    try:
        lines: Sequence[bytes] = file.read_bytes().splitlines()
    except OSError as problem:
        raise InvalidRecording(f"{file}: {problem.strerror or problem}") from None
    _check_head(file, lines[0] if lines else b"")
    found, unreadable = [], 0
    for line in lines[1:]:
        try:
            found.append(_decode(line))
        except msgspec.DecodeError:
            unreadable += 1
    return found, unreadable


def _check_head(file: Path, line: bytes) -> None:
    try:
        head = msgspec.json.decode(line)
    except msgspec.DecodeError:
        head = None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise InvalidRecording(f"{file}: not a recording of the setting `record`")
    if head.get("version") != VERSION:
        raise InvalidRecording(f"{file}: version {head.get('version')}; this program reads {VERSION}")
