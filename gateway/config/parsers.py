"""Parsers of single values: durations, sizes, addresses, header names, keys.

Pure. Each raises a ValueError that says what was expected.
"""

import ipaddress
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import parse_qs, urlsplit

from gateway.chat.image_address import parse_prefix

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
DURATION_PATTERN = r"^\s*\d+(\.\d+)?\s*(ms|s|m|h)?\s*$"
DURATION = "a duration: seconds, or text such as 500ms, 30s, 5m, 1h"

SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*(B|[KMG]i?B)?\s*$"
SIZE = "a size: bytes, or text such as 512KiB, 20MiB, 1MB"

SHELL_CHARACTERS = "|;&<>()"
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.6.2
HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_.])?")
PREFIX = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*")
ENDPOINT = re.compile(r"/(chat/completions|completions|embeddings|rerank|api/(chat|generate|tags|embed))$")

NAME_SCHEMES = ("dns", "dns+https")
REDIS_OPTIONS = frozenset(
    {"db", "password", "ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile"}
)
"""Options of redis-py that may be in a Redis URL."""

# Default port of each engine, for addresses that have neither a scheme nor a port, as in
# OLLAMA_HOST.
BARE_PORTS = {"ollama": 11434, "vllm": 8000}


def duration(value: object) -> float:
    """Return the seconds of a number, `30s`, `5m`, `1h` or `500ms`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value)
    if isinstance(value, str) and (match := re.fullmatch(DURATION_PATTERN, value, re.ASCII)):
        number = float(value.strip().removesuffix(match[2] or "").strip())
        if number < float("inf"):
            return number * UNITS[match[2] or "s"]
    raise ValueError(f"expected {DURATION}")


def positive_duration(value: object) -> float:
    """Return a duration that is not 0, because a deadline of 0 would fail every request."""
    seconds = duration(value)
    if seconds <= 0:
        raise ValueError(f"expected more than 0, as {DURATION}")
    return seconds


def size(value: object) -> int:
    """Return the bytes of a whole number, `20MiB` or `1MB`."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and (match := re.fullmatch(SIZE_PATTERN, value, re.ASCII)):
        unit = match[2] or ""
        count = float(value.strip().removesuffix(unit).strip()) * SIZES[unit]
        if 1 <= count < 2**63:
            return int(count)
    raise ValueError(f"expected {SIZE}")


def count(minimum: int, maximum: int = 2**31 - 1) -> Callable[[object], int]:
    """Return a parser of whole numbers from `minimum` to `maximum`.

    Unlike pydantic's own, it does not accept `true` as a number.
    """
    expectation = (
        f"expected a whole number from {minimum} to {maximum}"
        if maximum < 2**31 - 1
        else f"expected a whole number of at least {minimum}"
    )

    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,18}\s*", value, re.ASCII):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum:
            return value
        raise ValueError(expectation)

    return parse


def number(minimum: float, maximum: float, expectation: str) -> Callable[[object], float]:
    """Return a parser of numbers from `minimum` to `maximum`; `expectation` is for its error."""

    def parse(value: object) -> float:
        if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", value, re.ASCII):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and minimum <= value <= maximum:
            return float(value)
        raise ValueError(f"expected {expectation}")

    return parse


def count_or_auto(value: object) -> int | str:
    """Return a whole number of at least 1, or the word `auto`."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    try:
        return count(1)(value)
    except ValueError:
        raise ValueError("expected a whole number of at least 1, or auto") from None


def server_url(value: object, bare_port: int | None = None) -> str:
    """Return the address of a server as `base_url` does, or a name each of whose addresses is a server.

    Such a name is `dns://host[:port][/prefix]`, or `dns+https://…` for TLS. Without a port, the port
    of `dns` is `bare_port`. The function is idempotent.
    """
    scheme, marker, rest = value.strip().partition("://") if isinstance(value, str) else ("", "", "")
    scheme = scheme.lower()
    if marker and scheme not in ("http", "https", *NAME_SCHEMES):
        raise ValueError("expected an address that starts with http://, https:// or dns://")
    if not marker or scheme not in NAME_SCHEMES:
        return base_url(value, bare_port)
    if rest.startswith("/") or "://" in rest:
        raise ValueError("expected a host name, as in dns://vllm.example.com:8000")
    # The default port of dns is the engine's, that of dns+https is 443.
    found = base_url(rest if scheme == "dns" else f"https://{rest}", bare_port)
    return f"{scheme}://{found.partition('://')[2]}"


def base_url(value: object, bare_port: int | None = None) -> str:
    """Return `scheme://host[:port][/prefix]` for a server's address in any common notation.

    Surrounding blanks, and slashes and `/v1` at the end, are removed. Without a scheme it is http;
    without a scheme and a port, the port is `bare_port`. `0.0.0.0` and `[::]` say where a server
    listens, not where it can be reached, and become loopback. User and password (use `api_key` or
    `headers`), a query, a fragment and other schemes are refused. The function is idempotent.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected an address such as http://127.0.0.1:11434")
    text = value.strip()
    scheme, marker, rest = text.partition("://")
    if not marker:
        scheme, rest = "http", text
    elif (scheme := scheme.lower()) not in ("http", "https"):
        raise ValueError("expected an address that starts with http:// or https://")
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        raise ValueError("expected an address without user and password; use api_key or headers")
    if "?" in rest or "#" in rest:
        raise ValueError("expected an address without ? and #")
    host, port = _host_and_port(authority)
    if port is None and not marker:
        port = bare_port
    return f"{scheme}://{host}{'' if port is None else f':{port}'}{_prefix(slash + path)}"


def _host_and_port(authority: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(?::(?P<port>\d{1,5})?)?", authority, re.ASCII)
    if match is None:
        raise ValueError("expected host or host:port; put an IPv6 address in brackets, such as http://[::1]:11434")
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 1 <= port <= 65535:
        raise ValueError("expected a port from 1 to 65535")
    host = match["host"].lower()
    if host.startswith("["):
        try:
            address = ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise ValueError("expected an IPv6 address within the brackets") from None
        if address.scope_id is not None:
            raise ValueError("expected an IPv6 address without a zone (%…)")
        return (f"[{ipaddress.IPv6Address(1)}]" if address.is_unspecified else f"[{address.compressed}]"), port
    if not host and port is not None:
        return "127.0.0.1", port
    if not host.isascii():
        try:
            host = host.encode("idna").decode("ascii")
        except UnicodeError:
            raise ValueError("expected a host name") from None
    if not HOST.fullmatch(host) or ".." in host:
        raise ValueError("expected a host name")
    return ("127.0.0.1" if host == "0.0.0.0" else host), port  # noqa: S104 - compared, never bound


def _prefix(path: str) -> str:
    if ENDPOINT.search(path.rstrip("/")):
        raise ValueError("expected the server's base address, without the path of an endpoint")
    while path.endswith(("/", "/v1")):
        path = path.rstrip("/").removesuffix("/v1")
    if not PREFIX.fullmatch(path):
        raise ValueError("expected a path of plain URL characters")
    return path


def header_name(value: object) -> str:
    """Return a header's name in lower case."""
    if isinstance(value, str) and TOKEN.fullmatch(value.strip()):
        return value.strip().lower()
    raise ValueError("expected the name of a header")


def header_value(value: object) -> str:
    """Return a header's value: printable ASCII, without surrounding blanks."""
    if isinstance(value, str) and value.strip() and all(" " <= char <= "~" for char in value.strip()):
        return value.strip()
    raise ValueError("expected printable ASCII text")


def key(value: object) -> str:
    """Return a key for `Authorization: Bearer`: visible ASCII, all that HTTP clients can send."""
    if not isinstance(value, str) or not value or not all("!" <= char <= "~" for char in value):
        raise ValueError("expected visible ASCII characters, without blanks")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        raise ValueError("expected a key without quotes around it")
    return value


def redis_url(value: object) -> str:
    """Return the URL of a Redis server as redis-py reads it: `redis://`, `rediss://` with TLS, or `unix://`.

    No error repeats a part of it, because it may have a password.
    """
    expected = "expected an address such as redis://host:6379/0, rediss://user:password@host:6380 or unix:///path"
    if not isinstance(value, str) or not re.fullmatch(r"(redis|rediss|unix)://[!-~]+", value.strip(), re.IGNORECASE):
        raise ValueError(expected)
    try:
        parts = urlsplit(value.strip())
        options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        port = parts.port
    except ValueError:
        raise ValueError(expected) from None
    is_socket = parts.scheme == "unix"
    is_placed = len(parts.path) > 1 if is_socket else bool(parts.hostname) and port != 0
    if not is_placed or parts.fragment or not (is_socket or re.fullmatch(r"/?\d{0,5}", parts.path, re.ASCII)):
        raise ValueError(expected)
    if unknown := options.keys() - REDIS_OPTIONS:
        raise ValueError(
            f"{len(unknown)} unknown options behind ?; expected some of {', '.join(sorted(REDIS_OPTIONS))}"
        )
    return value.strip()


def keys(value: object) -> tuple[str, ...]:
    """Return the keys of a list or of comma-separated text, in order and without duplicates."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("expected comma-separated keys")
    try:
        return tuple(dict.fromkeys(key(item) for item in value))
    except ValueError:
        raise ValueError(
            "expected comma-separated keys of visible ASCII characters, none of them empty or in quotes"
        ) from None


def command(value: object) -> tuple[str, ...]:
    """Return the words of a command. Text is split as a shell would, but nothing in it is expanded.

    Characters by which a shell joins commands or redirects their output are refused in text outside quotes, since
    they would be passed to the program as plain words.
    """
    if isinstance(value, str):
        try:
            lexer = shlex.shlex(value, posix=True, punctuation_chars=SHELL_CHARACTERS)
            lexer.whitespace_split, lexer.commenters = True, ""
            words = list(lexer)
        except ValueError:
            raise ValueError("expected a command such as docker stop vllm, with closed quotes") from None
        if any(word and set(word) <= set(SHELL_CHARACTERS) for word in words):
            raise ValueError(
                "expected one command without a shell's |, ;, &, <, > or parentheses; put them into a script"
            )
        value = words
    if (
        isinstance(value, list | tuple)
        and value
        and all(isinstance(word, str) and "\0" not in word for word in value)
        and value[0].strip()
    ):
        return tuple(value)
    raise ValueError("expected a command such as docker stop vllm, or a list of its words")


def origin(value: object) -> str:
    """Return an origin as browsers send it, `https://host[:port]`, or `*`.

    One `*` may stand for a part of the host, or for the port.
    """
    if isinstance(value, str):
        text = value.strip().rstrip("/").lower()
        if text == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://(?!.*\*.*\*)[^/?#\s,@]+", text, re.ASCII):
            return text
    raise ValueError(
        "expected an origin such as https://chat.example.com, with at most one *, as in http://localhost:*; or *"
    )


def image_prefix(value: object) -> str:
    """Return the beginning of https addresses, with a host and a path."""
    if isinstance(value, str) and parse_prefix(value) is not None:
        return value.strip()
    raise ValueError("expected an https address such as https://cdn.example.com/images/, without query and user")


def host_name(value: object) -> str:
    """Return a host name or an IP address in lower case, without a port and without brackets."""
    if isinstance(value, str):
        text = value.strip().lower()
        if re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", text) or re.fullmatch(r"\[[0-9a-f:.]+\]", text):
            return text.strip("[]")
    raise ValueError("expected a host without a port, such as gateway.example.com or [::1]")


def network(value: object) -> str:
    """Return an IP address or network in its usual form, such as `10.0.0.0/8`."""
    if isinstance(value, str):
        with suppress(ValueError):
            return str(ipaddress.ip_network(value.strip(), strict=False))
    raise ValueError("expected an IP address or a network, such as 10.0.0.5 or 10.0.0.0/8")


def name(value: object) -> str:
    """Return the name of a tier or backend, which must fit into headers and metric labels."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}", value):
        return value
    raise ValueError("expected a name of letters, digits and . _ : / @ + -")


def public_name(value: object) -> str:
    """Return a name that clients send as `model`: printable text of any script."""
    if isinstance(value, str) and value == value.strip() and 0 < len(value) <= 256 and value.isprintable():
        return value
    raise ValueError("expected a name of printable text; put one that looks like a number in quotes")


def model_name(value: object) -> str:
    """Return a model's name upstream: printable ASCII, because it is sent in a response header."""
    if (
        isinstance(value, str)
        and value == value.strip()
        and 0 < len(value) <= 512
        and all(" " <= char <= "~" for char in value)
    ):
        return value
    raise ValueError("expected a model name of printable ASCII text; put one that looks like a number in quotes")


def keep_alive(value: object) -> int | float | str:
    """Return Ollama's `keep_alive`: seconds (negative: forever), or a duration as Go writes it."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
        return value
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
            return int(text)
        if re.fullmatch(r"-?(\d+(\.\d+)?(ns|us|µs|ms|s|m|h))+", text):
            return text
    raise ValueError("expected seconds, or a duration such as 10m; a negative value means forever")
