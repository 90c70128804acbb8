"""Tests of portable regular expressions."""

import contextlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engines.grammar.regex import MAX_COST, MAX_COUNT, check_expansion, portable, portable_whole
from gateway.errors import InvalidRequest

KEPT = {
    "^a$": "^a$",
    "^(?:ab|c)$": "^(ab|c)$",
    r"^(?P<year>\d{4})-(?<month>\d{2})$": "^([0-9]{4})-([0-9]{2})$",
    r"^\+?[1-9]\d{1,14}$": "^[+]?[1-9][0-9]{1,14}$",
    r"^[\w.+-]+@[\w-]+\.[a-z]{2,}$": "^[+.0-9A-Z_a-z-]+@[0-9A-Z_a-z-]+[.][a-z]{2,}$",
    r"^a\/b\-c$": "^a/b-c$",
    "^a$|^b$": "^(a|b)$",
    "^a+?b*?$": "^[a]+[b]*$",
    "^a{3}b{1}c{2,3}$": "^[a]{3}b[c]{2,3}$",
    r"^\^+[\^-]$": r"^(\^)+[-^]$",
    "^[+--]$": "^[+-,-]$",
    r"^[\]\[]$": r"^[\[\]]$",
    "^é*$": "^[é]*$",
    r"^\$\{a\}$": "^[$][{]a[}]$",
}
DROPPED = [
    "", "a", "^", "$", "^a", "a$", "^$", "^a|b$", "(^a$)", "^a$b", r"^a\$", "^(?=x)a$", "^(?!x)a$", "^(?<=x)a$",
    "^(?i)a$", r"^(a)\1$", r"^a\bb$", r"^\p{L}$", r"^\s$", r"^\S$", r"^\D$", r"^\W$", "^.$", "^[^a]$", '^"$', r"^\\$",
    r"^\n$", r"^\x41$", r"^\u0041$", "^[ -~]$", "^[", "^[$", "^[]$", "^[b-a]$", "^(a$", "^a)$", "^()$", "^(|a)$",
    "^(a|)$", "^*$", "^a**$", "^a{2}{3}$", "^a{2,1}$", "^a{,3}$", "^a{$", "^a{x}$", "^a{0}$", "^(a*)*$", "^(a?)+$",
    "^(a?b?){2}$", f"^a{{{MAX_COUNT + 1}}}$", f"^a{{1,{MAX_COUNT + 1}}}$", "^(a{100}){100}$",
    "^" + "a" * (MAX_COST + 1) + "$", "^" + "(" * 20 + "a" + ")" * 20 + "$", "^a\ud800$",
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "sent"), KEPT.items(), ids=KEPT)
def test_pattern_is_converted_to_syntax_that_all_engines_support(pattern: str, sent: str) -> None:
    assert portable(pattern) == sent


@pytest.mark.parametrize("pattern", DROPPED)
def test_pattern_that_misleads_or_crashes_an_engine_is_dropped(pattern: str) -> None:
    assert portable(pattern) is None


@pytest.mark.parametrize("pattern", KEPT.values())
def test_portable_pattern_is_unchanged(pattern: str) -> None:
    assert portable(pattern) == pattern


ATOMS = st.sampled_from(
    [
        "a",
        "b",
        "-",
        ".",
        r"\.",
        r"\d",
        r"\w",
        "[a-c]",
        "[^a]",
        r"[\w-]",
        "é",
        r"\^",
        "^",
        "[+-.]",
        "]",
        "(?:",
        "(",
        ")",
        "|",
        " ",
    ]
)
QUANTIFIERS = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,3}", "{0}", "+?"])
PATTERNS = st.lists(st.tuples(ATOMS, QUANTIFIERS), max_size=6).map(
    lambda pairs: f"^{''.join(atom + quantifier for atom, quantifier in pairs)}$"
)


@settings(deadline=None, max_examples=300)
@given(PATTERNS, st.lists(st.text("ab-. é^_1+,", max_size=5), min_size=5, max_size=5))
def test_portable_pattern_matches_the_same_texts(pattern: str, texts: list[str]) -> None:
    sent = portable(pattern)
    if sent is None:
        return
    for text in texts:
        assert bool(re.search(pattern, text, re.ASCII)) == bool(re.search(sent, text, re.ASCII))


# Patterns of whole texts


@settings(deadline=None, max_examples=300)
@given(PATTERNS, st.lists(st.text("ab-. é^_1+,", max_size=5), min_size=5, max_size=5))
def test_pattern_of_a_whole_text_matches_the_same_texts_with_and_without_anchors(
    pattern: str, texts: list[str]
) -> None:
    sent = portable_whole(pattern)
    bare = portable_whole(pattern[1:-1])
    for found in (sent, bare):
        for text in texts if found is not None else ():
            assert bool(re.fullmatch(pattern[1:-1], text, re.ASCII)) == bool(re.search(found or "", text, re.ASCII))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("yes|no", "^(yes|no)$"),
        ("^yes$|^no$", "^(yes|no)$"),
        (r"\d{2}", "^([0-9]{2})$"),
        (r"5\$", "^(5[$])$"),
        ("^a", "^(a)$"),
        ("a$", "^(a)$"),
        (".*", None),
        ("(?=a)a", None),
        ("", None),
    ],
)
def test_pattern_of_a_whole_text_gets_anchors(pattern: str, expected: str | None) -> None:
    assert portable_whole(pattern) == expected


@pytest.mark.parametrize(
    "pattern",
    [r"\d{4}-\d{2}", "[a-z]{1,64}@[a-z]{1,64}", r"\{500\}", "[{500}]", "a{,5}", "(a|b)*c", "[]{200}]{2}", "x{y}"],
)
def test_ordinary_pattern_may_be_written_out(pattern: str) -> None:
    assert check_expansion(pattern, "guided_regex") is pattern


@pytest.mark.parametrize(
    "pattern", ["a{129}", "a{1,129}", "((a{99}){99}){99}", "(a{100}b{100}){100}", "([{]{128}){100}"]
)
def test_pattern_that_grows_too_much_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_expansion(pattern, "guided_regex")
    assert caught.value.param == "guided_regex"


@given(st.text(r"ab()[]{}\,19*", max_size=30))
def test_any_text_can_be_measured(pattern: str) -> None:
    with contextlib.suppress(InvalidRequest):
        check_expansion(pattern, "guided_regex")
