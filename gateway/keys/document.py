"""Parser of the file of keys: from YAML text to policies. Pure.

All mistakes are reported at once, one line each: the entry, the field, the value, and what was
expected. No line has a value that could be a key.
"""

import difflib
import gc
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

import yaml

from gateway.keys.policy import LIMIT_NAMES, KeyPolicy, Limits

MAX_KEYS = 100_000

FIELDS = (
    "name", "sha256", "tiers", *LIMIT_NAMES, "priority", "expires", "on_limit", "trusted", "per_person",
)  # fmt: skip
"""Fields of an entry, in the order in which they are written."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_DOWNGRADE = re.compile(r"\s*downgrade\s*:\s*(\S.*?)\s*")


class KeysError(ValueError):
    """The file of keys cannot be used. `lines` has one line for each mistake."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("\n".join(self.lines))


@contextmanager
def _without_collections() -> Generator[None, None, None]:
    """Have no garbage collected: that stops all threads, with the nodes of a file of 10,000 keys for 0.3 s."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collections()
def parse(text: str) -> list[KeyPolicy]:
    """Return the policies in the text of a file of keys.

    Raises:
        KeysError: The text is empty, not YAML, or has an invalid entry.
    """
    try:
        document = _document(text)
    except KeysError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        raise KeysError([f"it is not valid YAML{f' (line {mark.line + 1})' if mark else ''}"]) from None
    if document is None:
        raise KeysError(["it is empty; expected `keys:` with a list"])
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise KeysError(["expected `keys:` with a list of entries; `keys: []` refuses every key"])
    lines = [f"{_shown(key)}: unknown key; expected: keys" for key in document if key != "keys"]
    entries = document["keys"]
    if len(entries) > MAX_KEYS:
        raise KeysError([f"keys: got {len(entries)} entries; expected at most {MAX_KEYS}"])
    policies = [policy for index, entry in enumerate(entries) if (policy := _policy(index, entry, lines)) is not None]
    _check_unique(policies, lines)
    if lines:
        raise KeysError(lines)
    return policies


if TYPE_CHECKING:
    from yaml import SafeLoader as _SafeLoader
else:
    _SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml takes an eighth of the time, if it is there


class _Loader(_SafeLoader):
    """Loader that leaves a date that does not exist as text, for a message that names its field."""

    def construct_timestamp(self, node: yaml.ScalarNode) -> object:
        try:
            return self.construct_yaml_timestamp(node)
        except ValueError:
            return node.value


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_timestamp)


def _document(text: str) -> Any:
    """Return what the YAML text says.

    Raises:
        KeysError: A mapping has a key twice, of which YAML would take the last one.
        yaml.YAMLError: It is not YAML.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        repeated = [
            f"{_shown(key.value)} (line {key.start_mark.line + 1}): it occurs twice; "
            "expected each field once, and a dash before each entry"
            for key in _repeated_keys(root)
        ]
        if repeated:
            raise KeysError(repeated)
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _repeated_keys(root: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """Yield each key that its mapping has had before. Anchors may make a node a part of itself."""
    seen: set[int] = set()
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += reversed(node.value)
        elif isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in names:
                        yield key
                    names.add(key.value)
                nodes.append(value)


def _policy(index: int, entry: object, lines: list[str]) -> KeyPolicy | None:
    if not isinstance(entry, dict):
        lines.append(f"keys[{index}]: expected a mapping of fields")
        return None
    name = entry.get("name")
    place = f"keys[{index}]" + (f" ({name})" if isinstance(name, str) and _NAME.fullmatch(name) else "")
    return _Entry(place, entry, lines).policy()


def _check_unique(policies: list[KeyPolicy], lines: list[str]) -> None:
    names: set[str] = set()
    digests: dict[bytes, str] = {}
    for policy in policies:
        if policy.name in names:
            lines.append(f"{policy.name}: the name occurs twice; expected a name for each key")
        elif policy.digest in digests:
            lines.append(f"{policy.name}: its sha256 is that of {digests[policy.digest]}; expected a key of its own")
        names.add(policy.name)
        digests[policy.digest] = policy.name


class _Entry:
    """Reader of one entry, which reports its mistakes in `lines`."""

    def __init__(self, place: str, entry: dict[Any, Any], lines: list[str]) -> None:
        self._place = place
        self._entry = entry
        self._lines = lines

    def policy(self) -> KeyPolicy | None:
        before = len(self._lines)
        self._check_fields(self._entry, FIELDS, "")
        name = self._read("name", _name)
        digest = self._read("sha256", _digest)
        for field, value in (("name", name), ("sha256", digest)):
            if value is None and self._entry.get(field) is None:
                self._add(field, "missing")
        per_person = self._per_person()
        is_trusted = self._read("trusted", _flag) or False
        if per_person is not None and not is_trusted:
            self._add("per_person", "expected `trusted: true` as well: the program is believed who asks")
        found = KeyPolicy(
            name=name or "",
            digest=digest or b"",
            limits=self._limits(self._entry, ""),
            tiers=self._read("tiers", _tiers),
            is_batch=self._read("priority", _priority) == "batch",
            expires=self._read("expires", _expires),
            downgrade=self._read("on_limit", _downgrade),
            is_trusted=is_trusted,
            per_person=per_person,
        )
        return found if len(self._lines) == before else None

    def _limits(self, fields: dict[Any, Any], prefix: str) -> Limits:
        return Limits(**{limit: self._read(limit, _count, fields, prefix) for limit in LIMIT_NAMES})

    def _per_person(self) -> Limits | None:
        fields = self._entry.get("per_person")
        if fields is None:
            self._check_empty("per_person", self._entry, "")
            return None
        if not isinstance(fields, dict):
            self._add("per_person", f"got {_shown(fields)}; expected limits, such as {{tokens_per_day: 100000}}")
            return None
        self._check_fields(fields, LIMIT_NAMES, "per_person.")
        limits = self._limits(fields, "per_person.")
        if not fields:
            self._add("per_person", f"expected at least one of {', '.join(LIMIT_NAMES)}")
        return limits

    def _check_fields(self, fields: dict[Any, Any], known: tuple[str, ...], prefix: str) -> None:
        for field in fields:
            if field not in known:
                near = difflib.get_close_matches(str(field), known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected: {', '.join(known)}"
                if field in ("key", "keys", "secret", "token"):
                    hint = "the file has the sha256 of a key, never the key; `gateway keys new` writes it"
                self._add(f"{prefix}{_shown(field)}", f"unknown field; {hint}")

    def _read(
        self, field: str, parser: Callable[[Any], Any], fields: dict[Any, Any] | None = None, prefix: str = ""
    ) -> Any:
        fields = self._entry if fields is None else fields
        value = fields.get(field)
        if value is None:
            self._check_empty(field, fields, prefix)
            return None
        try:
            return parser(value)
        except ValueError as error:
            got = "" if field == "sha256" else f"got {_shown(value)}; "
            self._add(prefix + field, f"{got}{error}")
            return None

    def _check_empty(self, field: str, fields: dict[Any, Any], prefix: str) -> None:
        """Refuse a field without a value: it would mean no limit, and may be the end of a file that is half written."""
        if field in fields and field not in ("name", "sha256"):  # those are missing
            self._add(prefix + field, "it is empty; expected a value, or an entry without the field")

    def _add(self, field: str, message: str) -> None:
        self._lines.append(f"{self._place}.{field}: {message}")


def _shown(value: object) -> str:
    """Return a value for a message: short, and never a text that could be a key."""
    if isinstance(value, str):
        return f"{value[:20]!r}…" if len(value) > 20 else repr(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else str(value)[:40]


def _name(value: object) -> str:
    return check_name(value)


def check_name(value: object) -> str:
    """Return the name of a key, which must fit into metric labels and logs.

    Raises:
        ValueError: It does not.
    """
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise ValueError("expected a name of at most 128 letters, digits and . _ : / @ + -")


def _digest(value: object) -> bytes:
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return bytes.fromhex(value)
    raise ValueError("expected the 64 hex digits of a key's SHA-256, in quotes")


def _tiers(value: object) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and names and all(isinstance(name, str) and name for name in names):
        return tuple(dict.fromkeys(names))
    raise ValueError("expected a list of names of tiers; without `tiers`, the key may use all")


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 53:
        return value
    raise ValueError("expected a whole number of at least 1; without the field, there is no limit")


def _priority(value: object) -> str:
    if value in ("interactive", "batch"):
        return str(value)
    raise ValueError("expected interactive or batch")


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError("expected true or false")


def _expires(value: object) -> float:
    return expires_at(value)


def expires_at(value: object) -> float:
    """Return the Unix time of a date or a time; without a time zone it is UTC.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            value = None
    if isinstance(value, datetime):
        moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        with suppress(OverflowError):  # years 0 and 10000 of UTC, which no date can show
            return moment.astimezone(UTC).timestamp()
    elif isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    raise ValueError("expected a date such as 2027-01-01, or a time such as 2027-01-01T18:00:00+09:00")


def _downgrade(value: object) -> str:
    if isinstance(value, str) and (match := _DOWNGRADE.fullmatch(value)):
        return match[1]
    if isinstance(value, dict) and list(value) == ["downgrade"]:
        name = value["downgrade"]
        if isinstance(name, str) and name.strip():
            return name.strip()
    raise ValueError('expected "downgrade: TIER", in quotes, or {downgrade: TIER}')
