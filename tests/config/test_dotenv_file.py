"""The file `.env`: lines that say nothing, and values that are probably not meant."""

from pathlib import Path

import pytest

from tests.config.harness import SECRET, load, one_problem, warned

pytestmark = pytest.mark.usefixtures("empty_environment")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "LLM_BACKEND=ollama\n\n# a comment\n\nGATEWAY_ADMIN_KEY\n",
            "GATEWAY_ADMIN_KEY: .env line 5 has no effect, because it has no '='; expected NAME=value",
        ),
        (
            "export GATEWAY__PORT\n",
            "GATEWAY__PORT: .env line 1 has no effect, because it has no '='; expected NAME=value",
        ),
        (f"{SECRET}\n", ".env line 1 has no effect, because it has no '='; expected NAME=value"),
    ],
)
def test_line_without_an_equals_sign_is_told_but_not_quoted(text: str, line: str) -> None:
    Path(".env").write_text(text)
    assert warned(load()) == [line]


@pytest.mark.parametrize("text", [f"=x\n{SECRET} y\n", f'\nGATEWAY_ADMIN_KEY="{SECRET}\n', f"{SECRET} {SECRET}\n"])
def test_line_that_cannot_be_read_is_refused(text: str) -> None:
    """Its variable, and with an open quote all below it, would silently count as unset."""
    Path(".env").write_text(text)
    with pytest.raises(Exception) as caught:
        load()
    assert str(caught.value).startswith((".env line 1: expected NAME=value", ".env line 2: expected NAME=value"))
    assert SECRET not in str(caught.value)


def test_quotes_and_comments_of_dotenv_are_no_part_of_a_value() -> None:
    Path(".env").write_text("GATEWAY_HOST=\"::1\"  # IPv6\nGATEWAY_PORT=81 # a comment\nOLLAMA_MODEL='a b'\n")
    settings = load()
    assert (settings.host, settings.port, settings.tiers["standard"].models["ollama"]) == ("::1", 81, "a b")


def test_unset_variable_in_a_setting_is_refused_by_its_name() -> None:
    Path(".env").write_text(
        "A=1\nOTHER=${NO}\nGATEWAY_HOST=${A}${B:-2}${FROM_ENVIRONMENT}\nGATEWAY_ADMIN_KEY=${ADMIN}\n"
    )
    assert one_problem(environ={"FROM_ENVIRONMENT": "3"}) == (
        "GATEWAY_ADMIN_KEY: the variable ADMIN is not set; "
        "expected a value in the environment or further up in .env (.env line 4)"
    )


def test_unreadable_file_is_refused() -> None:
    Path(".env").write_bytes(b"\xff\xfe")
    assert one_problem() == ".env: it is not UTF-8 text"
