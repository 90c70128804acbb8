"""Tests of portable regular expressions."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engines.grammar.regex import MAX_COST, MAX_COUNT, portable

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
