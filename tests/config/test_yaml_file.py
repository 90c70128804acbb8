"""Reading of the YAML file: keys, anchors, encodings and syntax errors."""

from pathlib import Path

import pytest

from gateway import config
from gateway.config import ConfigError
from tests.config.harness import load, problems

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_tier_names_that_yaml_reads_as_other_types_stay_text() -> None:
    assert list(load("tiers: {on: {models: {ollama: x}}, 4: {models: {ollama: y}}}").tiers) == ["on", "4"]


def test_anchors_and_merge_keys_work() -> None:
    settings = load("tiers:\n  a: &a {models: {ollama: x}, max_tokens: 5}\n  b:\n    <<: *a\n    models: {ollama: y}\n")
    assert (settings.tiers["b"].max_tokens, settings.tiers["b"].models) == (5, {"ollama": "y"})


def test_byte_order_mark_is_ignored() -> None:
    Path("gateway.yaml").write_bytes(b"\xef\xbb\xbfport: 81\n")
    Path(".env").write_bytes(b"\xef\xbb\xbfGATEWAY_HOST=::1\n")
    settings = config.load(Path("gateway.yaml"), {})
    assert (settings.port, settings.host) == (81, "::1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2", "expected ',' or ']', but got ':' (line 2)"),
        ("- a", "expected a mapping of settings"),
        ("port: 1\nport: 2", "port: duplicate key (gateway.yaml lines 1 and 2)"),
        ("tiers: {a: {models: {ollama: x}}, a: {models: {ollama: x}}}", "tiers.a: duplicate key"),
        ("? [a]\n: b", "expected a key that is text (line 1)"),
        ("a: &a {b: *a}", "nested too deeply"),
        ("port: !!python/object:os.system 1", "could not determine a constructor"),
    ],
)
def test_syntax_error_is_reported_with_its_line(text: str, words: str) -> None:
    assert any(words in line for line in problems(text))


def test_file_that_is_not_utf_8_is_refused() -> None:
    Path("gateway.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load(Path("gateway.yaml"), {})
