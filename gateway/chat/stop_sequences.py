"""Search for stop sequences in an answer, for engines that do not say which one ended it. Pure.

An engine that does not say so is asked without stop sequences. The gateway looks for them itself,
and ends the answer at the first one that is complete.
"""

from collections.abc import Iterable

from gateway.chat.answer import Delta


class StopMatcher:
    """Matcher of one answer, whatever pieces it comes in.

    Thoughts and content are searched apart: a sequence that begins in one does not end in the
    other. Tool calls are not searched. Of several sequences, the one that ends first counts, and of
    those that end together, the one that the request names first.
    """

    __slots__ = ("_held", "_is_reasoning", "_stops", "found", "pieces")

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = list(stops)
        self._held = ""
        """Text that may be the beginning of a stop sequence."""
        self._is_reasoning = False
        """True if the text that is held back is a thought."""
        self.found: str | None = None
        """The stop sequence that ended the answer."""
        self.pieces = 0
        """Number of pieces of model output so far."""

    def feed(self, deltas: list[Delta]) -> list[Delta]:
        """Return the deltas to show. At a match, the last one finishes the answer."""
        shown: list[Delta] = []
        for delta in deltas:
            if self.found is None:
                self.pieces += delta.is_piece
                self._add(delta, shown)
        return shown

    def _add(self, delta: Delta, shown: list[Delta]) -> None:
        for text, is_reasoning in ((delta.reasoning, True), (delta.content, False)):
            if text and self.found is None:
                if is_reasoning is not self._is_reasoning:
                    self._release(shown)
                    self._is_reasoning = is_reasoning
                self._search(text, shown)
        if self.found is not None:
            shown.append(Delta(finish="stop", stop_sequence=self.found))
            return
        if delta.calls or delta.finish is not None:
            self._release(shown)
        if delta.calls or delta.logprobs or delta.finish is not None or delta.usage is not None:
            delta.content = delta.reasoning = ""
            shown.append(delta)

    def _search(self, text: str, shown: list[Delta]) -> None:
        text, self._held = self._held + text, ""
        end, begin = len(text) + 1, len(text)
        for stop in self._stops:
            at = text.find(stop)
            if at >= 0 and at + len(stop) < end:
                end, begin, self.found = at + len(stop), at, stop
        if self.found is None:
            begin -= max((_beginning(text, stop) for stop in self._stops), default=0)
            self._held = text[begin:]
        self._show(text[:begin], shown)

    def _release(self, shown: list[Delta]) -> None:
        held, self._held = self._held, ""
        self._show(held, shown)

    def _show(self, text: str, shown: list[Delta]) -> None:
        if text:
            shown.append(Delta(reasoning=text) if self._is_reasoning else Delta(text))


def _beginning(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the longest beginning of `stop`."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
