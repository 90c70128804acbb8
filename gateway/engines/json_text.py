"""Reading of a text out of a JSON string that arrives in pieces. Pure.

Ollama's `format` takes only a JSON Schema. An answer that is to be one of some words therefore
arrives as a JSON string, and the client gets the bare word.
"""

import json
import re
from typing import Literal

_HIGH, _LOW, _HEX = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}", r"[0-9a-fA-F]{4}"
_whole_characters = re.compile(
    rf"""(?:[^"\\]+|{_HIGH}{_LOW}|\\u(?![dD][89abAB]){_HEX}|{_HIGH}(?=[^\\]|\\[^u]|\\u(?:[^dD]|[dD][^c-fC-F]))|\\[^u])*"""
).match
"""Match of the characters that are complete: half of a surrogate pair waits for the other half."""


class JsonTextReader:
    """Reader of one JSON string. Text of any other form is passed on as it is."""

    __slots__ = ("_held", "_state")

    def __init__(self) -> None:
        self._held = ""
        self._state: Literal["before", "inside", "after", "plain"] = "before"

    def feed(self, piece: str) -> str:
        """Return the text in the next piece of the string."""
        if self._state == "plain":
            return piece
        if self._state == "after":
            return ""
        held = self._held + piece
        if self._state == "before":
            beginning = held.lstrip()
            if not beginning:
                self._held = held
                return ""
            if not beginning.startswith('"'):
                self._state, self._held = "plain", ""
                return held
            held = beginning[1:]
            self._state = "inside"
        found = _whole_characters(held)
        end = found.end() if found else 0
        self._held = held[end:]
        if self._held.startswith('"'):
            self._state, self._held = "after", ""
        return _unescaped(held[:end])


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text
    try:
        found: str = json.loads(f'"{text}"', strict=False)
    except ValueError:  # an escape that JSON does not have
        return text
    return found.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
