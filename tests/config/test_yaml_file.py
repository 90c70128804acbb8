"""Reading of the YAML file: keys, anchors, encodings and syntax errors."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from gateway import config
from gateway.config import ConfigError
from tests.config.harness import load, one_problem, problems

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_tier_names_that_yaml_reads_as_other_types_stay_text() -> None:
    assert list(load("tiers: {on: {models: {ollama: x}}, 4: {models: {ollama: y}}}").tiers) == ["on", "4"]


def test_anchors_and_merge_keys_work() -> None:
    settings = load("tiers:\n  a: &a {models: {ollama: x}, max_tokens: 5}\n  b:\n    <<: *a\n    models: {ollama: y}\n")
    assert (settings.tiers["b"].max_tokens, settings.tiers["b"].models) == (5, {"ollama": "y"})


def test_own_keys_replace_merged_ones_in_their_place_and_the_first_merged_mapping_wins() -> None:
    settings = load(
        "x-a: &a {on: {models: {ollama: x}}, two: {models: {ollama: '${NOT_SET}'}}}\n"
        "x-b: &b {on: {models: {ollama: y}}, b: {models: {ollama: z}}}\n"
        "tiers:\n  three: {models: {ollama: t}}\n  two: {models: {ollama: w}}\n  <<: [*a, *b]\n"
    )
    models = {name: tier.models["ollama"] for name, tier in settings.tiers.items()}
    assert models == {"on": "x", "b": "z", "two": "w", "three": "t"}
    assert list(settings.tiers) == ["on", "b", "two", "three"]


def test_duplicate_key_beside_a_merged_one_is_reported() -> None:
    text = "x-a: &a {port: 1}\n<<: *a\nport: 2\nport: 3\n"
    assert one_problem(text) == "port: duplicate key (gateway.yaml lines 3 and 4)"


@pytest.mark.parametrize("key", ["x-", "x-common", "x-a.b"])
def test_top_level_key_for_anchors_is_ignored(key: str) -> None:
    text = f"{key}: &a {{concurrency: 3, list: [1, '${{NOT_SET}}', '${{']}}\nport: 81\n"
    settings = load(text)
    assert settings.port == 81
    assert settings.model_dump(exclude={"sources"}) == load("port: 81").model_dump(exclude={"sources"})


def test_key_for_anchors_is_unknown_below_the_top() -> None:
    assert one_problem("guard: {x-a: 1}").startswith("guard.x-a: unknown key")


def test_aliases_that_multiply_are_bounded() -> None:
    """Nine levels of nine aliases are 387,420,489 values."""
    names = "abcdefghi"
    levels = [f"x-{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise(names)]
    bomb = "\n".join(["x-a: &a [x, x, x, x, x, x, x, x, x]", *levels, "cors_origins: *i"])
    started = time.monotonic()
    assert one_problem(bomb).endswith("more than 100000 values, counting each use of an alias (line 1)")
    assert time.monotonic() - started < 20


def test_merges_that_multiply_are_bounded() -> None:
    names = "abcdefghijkl"
    levels = [f"x-{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}" for before, name in pairwise(names)]
    bomb = "\n".join(["x-a: &a {port: 81}", *levels, "guard: *l"])
    assert "more than 100000 values" in one_problem(bomb)


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
        ("tiers: &a {<<: *a}", "nested too deeply"),
        ("[" * 5000, "nested too deeply"),
        ("tiers:\n  <<: 3", "expected a mapping, or a list of mappings, to merge (line 2)"),
        ("port: !!python/object:os.system 1", "could not determine a constructor"),
    ],
)
def test_syntax_error_is_reported_with_its_line(text: str, words: str) -> None:
    assert any(words in line for line in problems(text))


def test_file_that_is_not_utf_8_is_refused() -> None:
    Path("gateway.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load(Path("gateway.yaml"), {})
