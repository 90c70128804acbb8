"""What is wrong with the settings: collected, so that all is told at once, one line each. Pure; knows where each key was written."""

import difflib
from collections.abc import Iterable, Mapping

Path = tuple[str | int, ...]

SECRET_KEYS = frozenset({"api_key", "api_keys", "admin_key", "metrics_key", "headers"})
MASK = "**********"


class ConfigError(Exception):
    """The settings cannot be used; `lines` say why, one line each: key, value, what was expected. Secrets are never in them."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("\n".join(self.lines))


def dotted(path: Path) -> str:
    """`("tiers", "pro", "aliases", 0)` as `tiers.pro.aliases[0]`."""
    text = ""
    for part in path:
        word = str(part) if str(part).isprintable() else repr(part)
        text += f"[{part}]" if isinstance(part, int) else f".{word}" if text else word
    return text


def suggest(word: str, known: Iterable[str], before: str = "") -> str:
    """`; did you mean 'x'?`, or nothing where nothing is near. `before` is what stands before each of the names, and makes none of them nearer."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {before + by_lower[near[0]]!r}?" if near else ""


def expected_one_of(names: Iterable[str], word: str = "") -> str:
    """`expected one of: a, b`, with the nearest named where `word` is near one."""
    listed = list(names)
    return f"expected one of: {', '.join(listed)}{suggest(word, listed) if word else ''}"


def shown(path: Path, value: object) -> str:
    """A value for people: short, and hidden where it is or may hold a secret."""
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
    """The lines so far, and where each key was written."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self._labels: dict[Path, tuple[str, str]] = {}
        self._told: list[Path] = []

    def written(self, path: Path, place: str, variable: str = "", *, whole: bool = False) -> None:
        """Remember that the value at `path` comes from `place`, by `variable` where it is the environment.

        `whole`: it takes the place of all that was written below `path`.
        """
        if whole:
            for deeper in [known for known in self._labels if known[: len(path)] == path]:
                del self._labels[deeper]
        self._labels[path] = (variable, place)

    def add(self, path: Path, message: str) -> None:
        """Say what is wrong at `path`, unless it follows from what was said about the same key already."""
        if self.has_reported(path):
            return
        self._told.append(path)
        self.lines.append(f"{self._key(path)}: {message}{self._place(path)}")

    def has_reported(self, path: Path) -> bool:
        """Whether something was said about this key, what is below it or what it is part of."""
        return any(path[: len(told)] == told[: len(path)] for told in self._told)

    def has_reported_whole(self, path: Path) -> bool:
        """Whether something was said about this key as a whole, or what it is part of."""
        return any(path[: len(told)] == told for told in self._told)

    def reported_below(self, path: Path) -> list[Path]:
        """The keys below `path` of which something was said."""
        return [told for told in self._told if len(told) > len(path) and told[: len(path)] == path]

    def add_line(self, line: str) -> None:
        """Say what belongs to no key."""
        self.lines.append(line)

    def warn(self, line: str) -> None:
        """What works, but is likely not what was meant."""
        if line not in self.warnings:
            self.warnings.append(line)

    def raise_any(self) -> None:
        """Raise ConfigError if anything is wrong."""
        if self.lines:
            raise ConfigError(dict.fromkeys(self.lines))

    def _label(self, path: Path) -> tuple[Path, str, str]:
        for end in range(len(path), 0, -1):
            if label := self._labels.get(path[:end]):
                return path[:end], *label
        return (), "", ""

    def _key(self, path: Path) -> str:
        found, variable, _ = self._label(path)
        if not variable:
            return dotted(path)
        rest = dotted(path[len(found) :])
        return f"{variable}{'' if rest.startswith('[') or not rest else '.'}{rest}"

    def _place(self, path: Path) -> str:
        place = self._label(path)[2]
        return f" ({place})" if place else ""
