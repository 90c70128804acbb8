"""Portable regular expressions: the subset that all engines' grammars support.

llama.cpp copies a pattern into its grammar almost unchanged. Its converter
(common/json-schema-to-grammar.cpp, both generations) uses a pattern to generate a text, not to
check one, in the form that the text has in JSON. A pattern must therefore begin with `^` and end
with `$`. `.`, `[^a]`, `\\s` and a literal quote would let the model end the string or break it with
a line end. The converter does not support classes like `\\d`; look-arounds and empty repetitions
crash it.
"""

import re

from msgspec import Struct

from gateway.errors import InvalidRequest

MAX_COUNT = 128
"""Maximum count of a repetition.

Above it, xgrammar 0.2.8 (in vLLM 0.32) fails while compiling the grammar. llama.cpp accepts 2000.
"""
MAX_COST = 1000
"""Maximum cost of a pattern: its characters times their repetitions. Each becomes a rule."""
MAX_LENGTH = 2 * MAX_COST
"""Maximum length of a pattern in characters. A longer one is dropped without being parsed."""
MAX_EXPANSION = 10_000
"""Maximum size of a pattern whose repetitions are written out, for engines that take any pattern."""
MAX_DEPTH = 16
"""Maximum nesting of groups."""

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-/:,;@#%&=!~'<>` ")
"""Characters that stand for themselves in every engine's patterns."""
_DIGIT_CHARACTERS = frozenset("0123456789")
_DIGITS = (0x30, 0x39)
_CLASSES = {"d": [_DIGITS], "w": [_DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]}

Ranges = list[tuple[int, int]]


class _Part(Struct, gc=False):
    """Rendered piece of a pattern."""

    text: str
    is_empty: bool = False
    """True if the piece can match nothing."""
    cost: int = 1
    char: int | None = None
    """The character, if the piece is a single one."""


class _NotPortable(Exception):
    pass


def portable(pattern: str) -> str | None:
    """Return an equivalent pattern that every engine supports, or None."""
    if len(pattern) > MAX_LENGTH:
        return None
    try:
        reader = _Reader(pattern)
        parts = [reader.anchored()]
        while reader.accepts("|"):
            parts.append(reader.anchored())
        reader.end()
    except _NotPortable:
        return None
    if sum(part.cost for part in parts) > MAX_COST:
        return None
    return f"^{parts[0].text}$" if len(parts) == 1 else f"^({'|'.join(part.text for part in parts)})$"


def portable_whole(pattern: str) -> str | None:
    """Return the portable form of a pattern that a whole text has to match, with or without anchors."""
    found = portable(pattern)
    if found is None:
        inside = pattern.removeprefix("^")
        if inside.endswith("$") and (len(inside) - len(inside[:-1].rstrip("\\"))) % 2:
            inside = inside[:-1]
        found = portable(f"^(?:{inside})$")
    return found


_COUNTS = re.compile(r"\{(\d{1,9})?(?:,(\d{1,9})?)?\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def check_expansion(pattern: str, param: str) -> str:
    """Return `pattern` if its repetitions, written out, have a size that an engine can compile.

    Raises:
        InvalidRequest: xgrammar or llama.cpp could fail on it, or not end.
    """
    sizes, last, at = [0], 0, 0
    while at < len(pattern):
        char = pattern[at]
        counts = _COUNTS.match(pattern, at) if char == "{" else None
        step = 1
        if counts is not None:
            most = max(int(number or 0) for number in counts.groups())
            if most > MAX_COUNT:
                raise InvalidRequest(f"'{param}' repeats something more than {MAX_COUNT} times.", param=param)
            sizes[-1] += last * max(most - 1, 0)
            last, step = last * max(most, 1), len(counts[0])
        elif char == "(":
            sizes.append(0)
        elif char == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif char not in "*+?|^$)":
            inside = _CLASS.match(pattern, at) if char == "[" else None
            step = len(inside[0]) if inside else 2 if char == "\\" else 1
            last = 1
            sizes[-1] += 1
        if sizes[-1] > MAX_EXPANSION:
            raise InvalidRequest(f"'{param}' is too large when its repetitions are written out.", param=param)
        at += step
    return pattern


class _Reader:
    """Parser for the portable subset of ECMA-262. Raises `_NotPortable` for anything else."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def accepts(self, mark: str) -> bool:
        found = self._text.startswith(mark, self._at)
        if found:
            self._at += len(mark)
        return found

    def end(self) -> None:
        if self._at != len(self._text):
            raise _NotPortable

    def anchored(self) -> _Part:
        """Parse one alternative of the whole pattern. The result does not contain its anchors."""
        self._expect("^")
        part = self._sequence()
        self._expect("$")
        return part

    def _expect(self, mark: str) -> None:
        if not self.accepts(mark):
            raise _NotPortable

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise _NotPortable
        self._at += 1
        return self._text[self._at - 1]

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _sequence(self) -> _Part:
        parts: list[_Part] = []
        cost = 0
        while self._peek() not in ("", "|", ")", "$"):
            part = self._repeated(self._atom())
            parts.append(part)
            cost += part.cost
            if cost > MAX_COST:
                raise _NotPortable
        if not parts:
            raise _NotPortable
        return _Part("".join(part.text for part in parts), all(part.is_empty for part in parts), cost)

    def _atom(self) -> _Part:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return _Part(_class_text(self._class()))
        if char == "\\":
            ranges = self._escape()
            return (
                _char(ranges[0][0]) if len(ranges) == 1 and ranges[0][0] == ranges[0][1] else _Part(_class_text(ranges))
            )
        if char in ".^$*+?{}]":
            raise _NotPortable
        return _char(_checked(ord(char)))

    def _group(self) -> _Part:
        if self.accepts("?") and not self.accepts(":"):
            self.accepts("P")
            self._expect("<")
            if self._peek() in ("=", "!"):
                raise _NotPortable
            while self._next() != ">":
                pass
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _NotPortable
        parts = [self._sequence()]
        while self.accepts("|"):
            parts.append(self._sequence())
        self._expect(")")
        self._depth -= 1
        return _Part(
            f"({'|'.join(part.text for part in parts)})",
            any(part.is_empty for part in parts),
            sum(part.cost for part in parts) + 1,
        )

    def _repeated(self, part: _Part) -> _Part:
        least, most = self._quantifier()
        if (least, most) == (1, 1):
            return part
        if (
            (part.is_empty and most != 1)
            or max(least, most or 0) > MAX_COUNT
            or most == 0
            or (most is not None and most < least)
        ):
            raise _NotPortable
        text = part.text if part.char is None else _class_text([(part.char, part.char)])
        return _Part(
            text + _quantifier_text(least, most), part.is_empty or least == 0, part.cost * max(least, most or 2)
        )

    def _quantifier(self) -> tuple[int, int | None]:
        """Parse a quantifier. Return the minimum and maximum number of repetitions."""
        if self.accepts("*"):
            bounds: tuple[int, int | None] = (0, None)
        elif self.accepts("+"):
            bounds = (1, None)
        elif self.accepts("?"):
            bounds = (0, 1)
        elif self.accepts("{"):
            least = self._count()
            most: int | None = least
            if self.accepts(","):
                most = None if self._peek() == "}" else self._count()
            self._expect("}")
            bounds = (least, most)
        else:
            return 1, 1
        self.accepts("?")  # lazy: matches the same texts
        if self._peek() in ("*", "+", "?", "{"):
            raise _NotPortable
        return bounds

    def _count(self) -> int:
        digits = ""
        while len(digits) <= 6 and self._peek() in _DIGIT_CHARACTERS:
            digits += self._next()
        if not 1 <= len(digits) <= 6:
            raise _NotPortable
        return int(digits)

    def _class(self) -> Ranges:
        if self._peek() == "^":
            raise _NotPortable
        found: Ranges = []
        while not self.accepts("]"):
            low = self._member()
            if (
                len(low) == 1
                and low[0][0] == low[0][1]
                and self._peek() == "-"
                and self._text[self._at + 1 : self._at + 2] != "]"
            ):
                self._at += 1
                high = self._member()
                if len(high) != 1 or high[0][0] != high[0][1] or high[0][0] < low[0][0]:
                    raise _NotPortable
                low = [(low[0][0], high[0][0])]
            found += low
        for first, last in found:
            _checked(first)
            _checked(last)
            if any(first <= ord(char) <= last for char in '"\\\x7f'):
                raise _NotPortable
        if not found:
            raise _NotPortable
        return found

    def _member(self) -> Ranges:
        char = self._next()
        return self._escape() if char == "\\" else [(ord(char), ord(char))]

    def _escape(self) -> Ranges:
        char = self._next()
        if char in _CLASSES:
            return _CLASSES[char]
        if char.isalnum() or not char.isascii() or char == "_":
            raise _NotPortable
        return [(_checked(ord(char)),) * 2]


def _checked(code: int) -> int:
    """Return `code` if JSON writes the character unescaped.

    Half of a surrogate pair is not portable.
    """
    if code < 0x20 or code in (0x22, 0x5C, 0x7F) or 0xD800 <= code <= 0xDFFF:
        raise _NotPortable
    return code


def _char(code: int) -> _Part:
    char = chr(code)
    return _Part(char if char in _PLAIN else r"\^" if char == "^" else _class_text([(code, code)]), char=code)


def _class_text(ranges: Ranges) -> str:
    """Return a character class without anything that an engine could take for an operator.

    These are `^` at the start, `-` inside, and two of a kind in a row.
    """
    merged: Ranges = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    split = [piece for pair in merged for piece in _without(pair, "-")]
    has_dash = len(split) != len(merged) or any(first <= 0x2D <= last for first, last in merged)
    pieces = [piece for pair in split for piece in _without(pair, "^")]
    has_caret = any(first <= 0x5E <= last for first, last in split)
    if has_caret and not pieces:
        return "[-^]" if has_dash else r"(\^)"
    text = "".join(
        _member_text(first) if first == last else f"{_member_text(first)}-{_member_text(last)}"
        for first, last in pieces
    )
    return f"[{text}{'^' if has_caret else ''}{'-' if has_dash else ''}]"


def _without(pair: tuple[int, int], char: str) -> Ranges:
    first, last = pair
    code = ord(char)
    if not first <= code <= last:
        return [pair]
    return [piece for piece in ((first, code - 1), (code + 1, last)) if piece[0] <= piece[1]]


def _member_text(code: int) -> str:
    return "\\" + chr(code) if chr(code) in "[]" else chr(code)


def _quantifier_text(least: int, most: int | None) -> str:
    if most is None:
        return {0: "*", 1: "+"}.get(least, f"{{{least},}}")
    if (least, most) == (0, 1):
        return "?"
    return f"{{{least}}}" if least == most else f"{{{least},{most}}}"
