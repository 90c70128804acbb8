"""The file of client keys."""

from pathlib import Path

import pytest

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
    ],
)
def test_keys_file_without_valid_keys_is_refused(text: str, words: str) -> None:
    Path("keys").write_text(text)
    line = one_problem(environ={"GATEWAY_API_KEYS_FILE": "keys"})
    assert line.startswith("GATEWAY_API_KEYS_FILE: 'keys': ")
    assert words in line
    assert SECRET not in line
