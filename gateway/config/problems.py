"""Mistakes in the settings, collected so that all are reported at once, one line each.

Pure. Knows where each key was written.
"""

import difflib
from collections.abc import Iterable, Mapping

Path = tuple[str | int, ...]

SECRET_KEYS = frozenset({"api_key", "api_keys", "admin_key", "metrics_key", "headers"})
MASK = "**********"


class ConfigError(Exception):
    """The settings are invalid.

    `lines` has one line for each mistake: key, value, and what was expected. They never contain
    secrets.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("\n".join(self.lines))


def dotted(path: Path) -> str:
    """Return `("tiers", "pro", "aliases", 0)` as `tiers.pro.aliases[0]`."""
    text = ""
    for part in path:
        word = str(part) if str(part).isprintable() else repr(part)
        text += f"[{part}]" if isinstance(part, int) else f".{word}" if text else word
    return text


def suggest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean 'x'?` with the most similar name, or nothing if no name is similar.

    `prefix` is put before the name; it does not count for the similarity.
    """
    by_lower = {name.lower(): name for name in known}
    similar = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {prefix + by_lower[similar[0]]!r}?" if similar else ""


def expected_one_of(names: Iterable[str], word: str = "") -> str:
    """Return `expected one of: a, b`, with a suggestion if `word` is similar to one of them."""
    listed = list(names)
    return f"expected one of: {', '.join(listed)}{suggest(word, listed) if word else ''}"


def shown(path: Path, value: object) -> str:
    """Return a value for people: shortened, and hidden if it may contain a secret."""
    if any(part in SECRET_KEYS for part in path):
        return MASK
    if isinstance(value, str):
        # An address can carry a password or a token.
        if "@" in value or "?" in value:
            return MASK
        return repr(value if len(value) <= 80 else value[:77] + "...")
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value) if abs(value) < 1e18 else "a huge number"
    return (
        "a list"
        if isinstance(value, list | tuple)
        else "a mapping"
        if isinstance(value, Mapping)
        else type(value).__name__
    )


class Problems:
    """Mistakes and warnings so far, and the origin of each key."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self._origins: dict[Path, tuple[str, str]] = {}
        self._reported: list[Path] = []

    def record_origin(self, path: Path, place: str, variable: str = "", *, whole: bool = False) -> None:
        """Remember that the value at `path` comes from `place`, and from `variable` if it has one.

        With `whole` it replaces everything that was written below `path`.
        """
        if whole:
            for deeper in [known for known in self._origins if known[: len(path)] == path]:
                del self._origins[deeper]
        self._origins[path] = (variable, place)

    def add(self, path: Path, message: str) -> None:
        """Report a mistake at `path`, unless one was reported there, above it or below it."""
        if self.has_reported(path):
            return
        self._reported.append(path)
        self.lines.append(f"{self._key(path)}: {message}{self._place(path)}")

    def has_reported(self, path: Path) -> bool:
        """Return whether a mistake was reported for this key, above it or below it."""
        return any(path[: len(reported)] == reported[: len(path)] for reported in self._reported)

    def has_reported_whole(self, path: Path) -> bool:
        """Return whether a mistake was reported for this key as a whole, or above it."""
        return any(path[: len(reported)] == reported for reported in self._reported)

    def reported_below(self, path: Path) -> list[Path]:
        """Return the keys below `path` for which a mistake was reported."""
        return [reported for reported in self._reported if len(reported) > len(path) and reported[: len(path)] == path]

    def add_line(self, line: str) -> None:
        """Report a mistake that does not belong to a key."""
        self.lines.append(line)

    def warn(self, line: str) -> None:
        """Warn of something that works but is probably unintended."""
        if line not in self.warnings:
            self.warnings.append(line)

    def raise_any(self) -> None:
        """Raise ConfigError if there are mistakes."""
        if self.lines:
            raise ConfigError(dict.fromkeys(self.lines))

    def _origin(self, path: Path) -> tuple[Path, str, str]:
        """Return the path of the nearest key with a known origin, its variable and its place."""
        for end in range(len(path), 0, -1):
            if origin := self._origins.get(path[:end]):
                return path[:end], *origin
        return (), "", ""

    def _key(self, path: Path) -> str:
        found, variable, _ = self._origin(path)
        if not variable:
            return dotted(path)
        rest = dotted(path[len(found) :])
        return f"{variable}{'' if rest.startswith('[') or not rest else '.'}{rest}"

    def _place(self, path: Path) -> str:
        place = self._origin(path)[2]
        return f" ({place})" if place else ""
