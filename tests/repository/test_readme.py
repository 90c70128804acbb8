"""README.md and README.ko.md have the same commands, working links, and the lines that `make run` prints."""

import re
from pathlib import Path

import pytest

from gateway import config
from gateway.cli.demo import STANDINS, Found, _welcome

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.ko.md")
DOCUMENTS = [
    *READMES,
    "CHANGELOG.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]
WORDS = "a stand-in, since none was found on this machine"


def code_blocks(name: str) -> list[str]:
    """The blocks of a document, without comments, which are in its language."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(r" +# .*", "", block) for block in blocks]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_both_languages_show_the_same_commands() -> None:
    english, korean = map(code_blocks, READMES)
    assert english == korean
    assert "make run\nmake test\n" in english


def test_both_languages_have_the_same_parts() -> None:
    english, korean = (re.findall(r"^(?:#+|\||-) ?", (ROOT / name).read_text(), re.MULTILINE) for name in READMES)
    assert english == korean


def test_each_language_leads_to_the_other() -> None:
    assert "(README.ko.md)" in (ROOT / "README.md").read_text()[:200]
    assert "(README.md)" in (ROOT / "README.ko.md").read_text()[:200]


@pytest.mark.parametrize("name", READMES)
def test_readme_fits_a_sitting(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= 200


def test_readme_has_the_lines_that_make_run_prints() -> None:
    settings = config.build({"tiers": {"standard": {"models": {kind: model.name for kind, model in STANDINS.items()}}}})
    found = {kind: Found("http://127.0.0.1:1", model.name, WORDS) for kind, model in STANDINS.items()}
    welcome = _welcome("http://127.0.0.1:8080", settings, found["ollama"], found["vllm"])
    printed = {line.strip() for line in welcome.splitlines()}
    readme = {line.strip() for line in (ROOT / "README.md").read_text().splitlines()}
    beginnings = ("The gateway serves", "ollama ", "vllm ", "curl", "-d", "from langchain", "chat =", "print(")
    copied = [line for line in printed if line.startswith(beginnings)]
    assert len(copied) == len(beginnings)
    assert [line for line in copied if line not in readme] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_link_leads_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / name).read_text()):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in {slug(heading) for heading in re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)}, (
                target
            )
