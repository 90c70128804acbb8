"""Parsers of durations, sizes, addresses and other values, in every common notation."""

import contextlib
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.config import parsers


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:11434", "http://127.0.0.1:11434"),
        ("http://127.0.0.1:8001/v1", "http://127.0.0.1:8001"),
        (" http://Host:8001/v1/ ", "http://host:8001"),
        ("https://host/openai/v1", "https://host/openai"),
        ("https://host/Prefix/", "https://host/Prefix"),
        ("HTTPS://host", "https://host"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:11435", "http://127.0.0.1:11435"),
        ("http://[::]:1", "http://[::1]:1"),
        (":8000", "http://127.0.0.1:8000"),
        ("host", "http://host:11434"),
        ("host/v1", "http://host:11434"),
        ("http://host", "http://host"),
        ("my_ollama:11434", "http://my_ollama:11434"),
        ("[::1]:11434", "http://[::1]:11434"),
        ("http://[2001:DB8::1]/v1", "http://[2001:db8::1]"),
        ("http://모델.example", "http://xn--bo1b89k.example"),
    ],
)
def test_address_is_accepted_in_every_common_notation(text: str, url: str) -> None:
    assert parsers.base_url(text, 11434) == url


@pytest.mark.parametrize(
    "text",
    ["", " ", "http://", "ftp://h", "unix:///x", "http://u@h", "u:p@h", "http://h?x", "http://h#x", "http://h:0",
     "http://h:65536", "http://h:x", "::1", "http://::1:80", "http://[::1", "http://[h]", "http://[fe80::1%25eth0]",
     "http://a b", "http://a..b", "http://h/a b", "http://h\n/", "http://h/v1/chat/completions",
     "http://h:11434/api/chat", "http://-h", "http://h\\x", "http://h/\u00e9", "http://h//x", None, 80],
)  # fmt: skip
def test_invalid_address_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        parsers.base_url(text)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("dns://vllm.svc:8000", "dns://vllm.svc:8000"),
        (" DNS://Vllm.Svc:8000/v1/ ", "dns://vllm.svc:8000"),
        ("dns://vllm", "dns://vllm:8000"),
        ("dns://vllm/a/v1", "dns://vllm:8000/a"),
        ("dns+https://vllm", "dns+https://vllm"),
        ("dns+https://vllm:8443/a", "dns+https://vllm:8443/a"),
        ("dns://모델.example:1", "dns://xn--bo1b89k.example:1"),
        ("dns://[::1]:1", "dns://[::1]:1"),
        ("http://host", "http://host"),
        ("host", "http://host:8000"),
    ],
)
def test_server_may_be_a_name_whose_addresses_are_servers(text: str, url: str) -> None:
    assert parsers.server_url(text, 8000) == url
    assert parsers.server_url(url, 8000) == url


@pytest.mark.parametrize(
    "text",
    ["dns://", "dns:///a:1", "dns://u@h", "dns://h:0", "dns://h?x", "dns://http://h", "dns+http://h", "srv://h",
     "dns+https:///h", "dns://a..b", "dns://h/v1/chat/completions", None, ""],
)  # fmt: skip
def test_invalid_name_of_servers_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        parsers.server_url(text, 8000)


def test_name_of_servers_is_refused_where_one_address_is_needed() -> None:
    with pytest.raises(ValueError, match="starts with http"):
        parsers.base_url("dns://vllm:8000")


HOSTS = st.sampled_from(["localhost", "10.0.0.5", "gpu-1.lan", "[::1]", "[2001:db8::7]", "my_box"])
PREFIXES = st.sampled_from(["", "/openai", "/a/b", "/proxy-1"])
PORTS = st.one_of(st.none(), st.integers(1, 65535))


@given(
    st.sampled_from(["", "http://", "https://"]),
    HOSTS,
    PORTS,
    PREFIXES,
    st.sampled_from(["", "/", "/v1", "/v1/", "//", "/v1//"]),
)
def test_address_keeps_scheme_host_port_and_prefix(
    scheme: str, host: str, port: int | None, prefix: str, end: str
) -> None:
    number = "" if port is None else f":{port}"
    assert parsers.base_url(f"{scheme}{host}{number}{prefix}{end}") == f"{scheme or 'http://'}{host}{number}{prefix}"


@given(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=40)
    | st.from_regex(r"(https?://)?[a-z0-9.:\[\]%@/?#v-]{1,30}", fullmatch=True)
)
@example("http://h/v1/v1")
@example("//h")
@example("0/@")
@example("http://ＥＸＡＭＰＬＥ.com")
def test_parsing_an_address_is_idempotent_and_raises_only_value_errors(text: str) -> None:
    try:
        url = parsers.base_url(text, 8000)
    except ValueError:
        return
    assert parsers.base_url(url) == url
    assert re.fullmatch(r"https?://[!-~]+", url)
    assert not re.search(r"://[^/]*@|[?#]|/v1$|/$", url)


@given(
    st.floats(0, 1e6, allow_nan=False).map(lambda number: round(number, 3)),
    st.sampled_from(["", "ms", "s", "m", "h"]),
    st.sampled_from(["", " "]),
)
def test_duration_is_its_number_times_its_unit(number: float, unit: str, blank: str) -> None:
    seconds = number * {"": 1, "ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit]
    assert parsers.duration(f"{number:.3f}{blank}{unit}") == pytest.approx(seconds)
    assert parsers.duration(number) == number


@given(st.text(max_size=12))
def test_duration_of_any_text_is_seconds_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert 0 <= parsers.duration(text) < float("inf")


@pytest.mark.parametrize(
    "value",
    ["-1", "1 d", "1h30m", "inf", "", "1_000", "1e3", "٣", True, None, -1, float("inf"), float("nan"), [1], "9" * 400],
)
def test_invalid_duration_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        parsers.duration(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1), ("20MiB", 20 * 2**20), ("1MB", 10**6), ("1.5 KiB", 1536), ("7", 7), ("1GB", 10**9), ("12B", 12)],
)
def test_size_is_converted_to_bytes(value: object, expected: int) -> None:
    assert parsers.size(value) == expected


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "20m", "0", "x", None, "9" * 30])
def test_invalid_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parsers.size(value)


@pytest.mark.parametrize(
    ("value", "expected"), [(-1, -1), ("-1", -1), ("10m", "10m"), ("1h30m", "1h30m"), (300, 300), ("0", 0)]
)
def test_keep_alive_is_converted_to_what_ollama_accepts(value: object, expected: object) -> None:
    assert parsers.keep_alive(value) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("docker stop vllm", ("docker", "stop", "vllm")),
        ("  run  'a b' \"c d\" e\\ f ", ("run", "a b", "c d", "e f")),
        ("run $HOME * ~ #5", ("run", "$HOME", "*", "~", "#5")),
        ("sh -c 'a && b | c'", ("sh", "-c", "a && b | c")),
        (["docker", "stop", "a;b"], ("docker", "stop", "a;b")),
    ],
)
def test_command_is_split_into_words_and_nothing_is_expanded(value: object, words: tuple[str, ...]) -> None:
    assert parsers.command(value) == words


@pytest.mark.parametrize(
    "value",
    ["", "  ", "a; b", "a && b", "a|b", "a > b", "a & ", "(a)", "a 'b", [], [""], ["a", 1], ["a\0"], 5, None, True, {}],
)
def test_what_only_a_shell_could_run_is_not_a_command(value: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        parsers.command(value)
