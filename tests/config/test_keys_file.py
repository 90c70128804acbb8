"""The files of keys: that of the client keys, and that of the key for a backend."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway import config
from tests.config.harness import SECRET, load, one_problem

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_keys_file_has_one_key_per_line_and_comments() -> None:
    Path("keys").write_text("# people\nalice-key-0123456789  # Alice\n\nbob-key-0123456789ab\nalice-key-0123456789\n")
    settings = load(environ={"GATEWAY_API_KEYS_FILE": "keys", "GATEWAY_API_KEYS": SECRET})
    assert [key.get_secret_value() for key in settings.api_keys] == [
        SECRET,
        "alice-key-0123456789",
        "bob-key-0123456789ab",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected at least one key"),
        ("# none\n", "expected at least one key"),
        (f"ok-key\n{SECRET} b\n", "line 2: expected"),
        (f'"{SECRET}"\n', "line 1: expected a key without quotes"),
    ],
)
def test_keys_file_without_valid_keys_is_refused(text: str, words: str) -> None:
    Path("keys").write_text(text)
    line = one_problem(environ={"GATEWAY_API_KEYS_FILE": "keys"})
    assert line.startswith("GATEWAY_API_KEYS_FILE: 'keys': ")
    assert words in line
    assert SECRET not in line


BACKEND = "backends: {vllm: {api_key_file: key%s}}"


@pytest.mark.parametrize("content", [SECRET, f"{SECRET}\n", f"{SECRET}\r\n", f"\ufeff{SECRET}\n\n"])
def test_key_of_a_backend_is_read_from_its_file(content: str) -> None:
    Path("key").write_bytes(content.encode())
    settings = load(BACKEND % "")
    assert settings.backends["vllm"].api_key == SecretStr(SECRET)
    shown = config.show(settings)
    assert "api_key_file: key" in shown
    assert SECRET not in shown
    assert load(shown).backends == settings.backends


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        ("", "the file is empty"),
        ("\n", "the file is empty"),
        (f"{SECRET}\n{SECRET}\n", "expected visible ASCII"),
        (f"{SECRET} # for vLLM\n", "expected visible ASCII"),
        (f'"{SECRET}"\n', "expected a key without quotes"),
        ("k" * 70_000, "the file is too long"),
    ],
)
def test_wrong_key_file_of_a_backend_is_refused(content: str | None, words: str) -> None:
    if content is not None:
        Path("key").write_text(content)
    line = one_problem(BACKEND % "")
    assert line.startswith("backends.vllm.api_key_file: 'key': ")
    assert line.endswith("(gateway.yaml line 1)")
    assert words in line
    assert SECRET not in line


def test_folder_is_not_a_key_file() -> None:
    Path("key").mkdir()
    assert "Is a directory" in one_problem(BACKEND % "")


def test_key_and_key_file_exclude_each_other_in_one_source() -> None:
    Path("key").write_text(SECRET)
    line = one_problem(BACKEND % ", api_key: other")
    assert line == (
        "backends.vllm.api_key_file: both api_key and api_key_file are set; expected only one of them "
        "(gateway.yaml line 1)"
    )


def test_variable_with_the_key_takes_precedence_over_the_key_file_of_the_yaml() -> None:
    """The file of the YAML need not even exist."""
    assert load(BACKEND % "", {"VLLM_API_KEY": SECRET}).backends["vllm"].api_key == SecretStr(SECRET)
    Path("key").write_text(SECRET)
    settings = load("backends: {vllm: {api_key: other}}", {"GATEWAY__BACKENDS__VLLM__API_KEY_FILE": "key"})
    assert settings.backends["vllm"].api_key == SecretStr(SECRET)


def test_header_authorization_beside_a_key_file_is_refused() -> None:
    Path("key").write_text(SECRET)
    line = one_problem(BACKEND % ", headers: {authorization: x}")
    assert "the gateway sets this header itself" in line
