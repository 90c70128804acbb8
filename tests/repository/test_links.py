"""Links between documents, and the repository paths that the developers' documents name."""

import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path, PurePosixPath
from posixpath import normpath
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
DEVELOPERS_DOCUMENTS = ("CONTRIBUTING.md", "docs/architecture.md")
SUFFIXES = {".example", ".in", ".json", ".md", ".py", ".toml", ".txt", ".typed", ".yaml", ".yml"}

FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
INLINE_LINK = re.compile(r"\]\(\s*(?:<([^>]*)>|([^\s()]*(?:\([^\s()]*\)[^\s()]*)*))(?:\s+[\"'(][^)]*)?\s*\)")
DEFINITION = re.compile(r"^ {0,3}\[[^\]^][^\]]*\]:[ \t]*<?([^\s>]+)", re.MULTILINE)
ATTRIBUTE = re.compile(r"\b(?:href|src)=[\"']([^\"']+)[\"']")
SCHEME = re.compile(r"[a-z][a-z0-9+.\-]*:|//", re.IGNORECASE)
HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE)
ANCHOR = re.compile(r"<a\b[^>]*\b(?:id|name)=[\"']([^\"']+)[\"']")
LINE = re.compile(r"L(\d+)(?:-L(\d+))?")
PATH = re.compile(r"\.?[\w\-]+(?:[./][\w.\-]+)*/?(?::\w+)?")


@cache
def files() -> frozenset[str]:
    """Every file that is tracked or about to be, by its path from the root. A file system may ignore
    case; GitHub does not."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    return frozenset(name for name in listed.split("\0") if name and (ROOT / name).exists())


@cache
def folders() -> frozenset[str]:
    return frozenset(str(parent) for name in files() for parent in PurePosixPath(name).parents)


DOCUMENTS = sorted(name for name in files() if name.endswith(".md"))


def prose(text: str) -> str:
    """`text` without code blocks and comments."""
    return COMMENT.sub("", FENCE.sub("", text))


def links(text: str) -> list[str]:
    """Targets of the links in a document, without those to other sites."""
    text = CODE.sub("", prose(text))
    found = [bracketed or plain for bracketed, plain in INLINE_LINK.findall(text)]
    found += DEFINITION.findall(text) + ATTRIBUTE.findall(text)
    return [target for target in found if not SCHEME.match(target)]


def anchors(text: str) -> set[str]:
    """Anchors of a document's headings by GitHub's rules: text in lower case, no punctuation, hyphens
    for spaces, and a number for a repeated one. Anchors written as HTML count too."""
    text = prose(text)
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in HEADING.findall(text):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found | set(ANCHOR.findall(text))


def problem(document: str, target: str) -> str | None:
    """Return what is wrong with a link in `document`, or None."""
    path, _, anchor = unquote(target).partition("#")
    base = "" if path.startswith("/") else str(PurePosixPath(document).parent)
    name = normpath(f"{base}/{path}".lstrip("/")) if path else document
    if name not in files() and name not in folders():
        return f"{target}: there is no {name}"
    if not anchor:
        return None
    if name.endswith(".md"):
        return None if anchor in anchors((ROOT / name).read_text()) else f"{target}: {name} has no such heading"
    lines = LINE.fullmatch(anchor)
    last = int(lines[2] or lines[1]) if lines and name in files() else None
    length = len((ROOT / name).read_text().splitlines()) if last is not None else 0
    return None if last is not None and last <= length else f"{target}: {name} has no such anchor"


def named_paths(text: str) -> list[str]:
    """The code spans of a document that look like paths of this repository, perhaps with `:Name` behind them."""
    tops = {name.partition("/")[0] for name in files() if "/" in name}
    found = []
    for _, span in CODE.findall(prose(text)):
        path = span.partition(":")[0]
        is_below_top = "/" in path and path.partition("/")[0] in tops
        if PATH.fullmatch(span) and (is_below_top or PurePosixPath(path).suffix in SUFFIXES):
            found.append(span)
    return found


def is_defined(name: str, file: str) -> bool:
    """Return whether a Python file defines `name` as a class, a function or a value."""
    definition = rf"^\s*(?:class|def|async def) {name}\b|^\s*{name}\b[^=\n]*="
    return re.search(definition, (ROOT / file).read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_link_leads_somewhere(document: str) -> None:
    problems = [problem(document, target) for target in links((ROOT / document).read_text())]
    assert [text for text in problems if text] == []


@pytest.mark.parametrize("document", DEVELOPERS_DOCUMENTS)
def test_path_that_a_document_names_exists(document: str) -> None:
    missing = []
    for span in named_paths((ROOT / document).read_text()):
        path, _, name = span.partition(":")
        path = path.rstrip("/")
        if path not in files() | folders() or (name and not is_defined(name, path)):
            missing.append(span)
    assert missing == []


def test_anchors_are_those_of_github() -> None:
    text = "# Why `so`, and how?\n## A [link](x.md) & more\n## Twice ##\n## Twice\n```sh\n# none\n```\n### 설정 파일\n"
    assert anchors(text) == {"why-so-and-how", "a-link--more", "twice", "twice-1", "설정-파일"}


def test_links_are_found_in_every_form() -> None:
    text = (
        "[a](a.md#x) ![b](<b c.png>) [`d`](d.md 'title')\n[e]\n\n[e]: e.md\n<img src='f.svg'>\n"
        "[g](https://g.example) `[h](h.md)`\n```\n[i](i.md)\n```\n<!-- [j](j.md) -->\n"
    )
    assert links(text) == ["a.md#x", "b c.png", "d.md", "e.md", "f.svg"]


def test_wrong_links_are_reported() -> None:
    assert problem("docs/adr/0001-own-connection-pool.md", "../../README.md#documentation") is None
    assert problem("README.md", "/docs/") is None
    assert problem("README.md", "gateway/errors.py#L1") is None
    for target in ("readme.md", "docs/no.md", "#no", "../outside.md", "gateway/errors.py#L100000", "gateway/#no"):
        assert problem("README.md", target) is not None


def test_paths_are_distinguished_from_other_code() -> None:
    text = "`gateway/errors.py:GatewayError` `pyproject.toml` `/v1/models` `make test` `.ci/run` `tests/<x>/` `docs/`"
    assert named_paths(text) == ["gateway/errors.py:GatewayError", "pyproject.toml", ".ci/run", "docs/"]
