"""Resolution of top-level keys: the guard, client keys, and values that contradict each other."""

import pytest

from gateway import config
from tests.config.harness import SECRET, assert_refused, load, one_problem

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_guard_is_off_unless_it_is_set_and_has_defaults() -> None:
    assert load().guard is None
    assert load("guard:").guard is None
    defaults = load("guard: {}").guard
    assert defaults is not None
    assert (len(defaults.rules), defaults.margin, defaults.ratio, defaults.grace, defaults.false_alarms) == (
        5,
        0.005,
        1.5,
        30.0,
        0.01,
    )
    assert load(environ={"GATEWAY__GUARD": "{}"}).guard == defaults
    named = load("guard: {margin: 0.02}", {"GATEWAY__GUARD__RULES": "errors,empty,errors"}).guard
    assert named is not None
    assert (named.rules, named.margin) == (("errors", "empty"), 0.02)
    assert config.check(load("guard: {rules: [empty]}"))[-2] == "the guard compares empty"


def test_admin_key_must_not_be_a_client_key() -> None:
    line = one_problem(environ={"GATEWAY_API_KEYS": SECRET, "GATEWAY_ADMIN_KEY": SECRET})
    assert line == "GATEWAY_ADMIN_KEY: the admin key is also a client key; expected a separate key (environment)"


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("max_body: 1KiB", "max_text_body", "got 1048576; expected at most max_body, which is 1024 bytes"),
        ("user_header: X-A\nsession_header: x-a", "session_header", "expected a header other than user_header"),
        ("ollama_port: 8080", "ollama_port", "expected a port other than the gateway's own"),
        ("metrics_port: 9000\nollama_port: 9000", "ollama_port", "expected a port other than metrics_port"),
        ("metrics_port: 8080", "metrics_port", "expected a port other than the gateway's own"),
        ("api_keys_file: none.txt", "api_keys_file", "'none.txt': No such file or directory"),
    ],
)
def test_contradictory_value_is_refused_in_one_line(text: str, key: str, words: str) -> None:
    assert_refused(text, key, words)
