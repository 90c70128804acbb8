import ast
from pathlib import Path

import pytest

from gateway.bench.quality_style import RULES, style_score

GOOD = '''
import math


def area(radius: float) -> float:
    """Return the area of a circle."""
    return math.pi * radius**2
'''


def test_code_that_keeps_every_rule_has_the_full_score() -> None:
    assert style_score(GOOD) == 1


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("annotated", "def f(x):\n    'Doc.'\n    return x"),
        ("documented", "def f(x: int) -> int:\n    return x"),
        ("no bare or silent except", "try:\n    print()\nexcept:\n    raise"),
        ("no bare or silent except", "try:\n    print()\nexcept Exception:\n    pass"),
        ("no mutable default", "def _f(x: list[int] = []) -> None:\n    print(x)"),
        ("functions of at most 40 lines", "def _f() -> None:\n" + "    print()\n" * 41),
        ("at most 10 branches", "def _f(x: int) -> None:\n" + "    if x:\n        print()\n" * 11),
        ("nothing unused", "import os"),
        ("nothing unused", "def _f() -> int:\n    x = 1\n    return 2"),
        ("no eval or exec", "eval('1')"),
    ],
)
def test_code_that_breaks_one_rule_loses_that_rule(rule: str, code: str) -> None:
    assert style_score(code) == pytest.approx(1 - 1 / len(RULES))
    assert [name for name, keeps in RULES.items() if not keeps(ast.parse(code))] == [rule]


def test_what_does_not_parse_scores_nothing() -> None:
    assert style_score("def f(:") == 0


def test_each_rule_is_documented() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "compare.md").read_text().split())
    assert [rule for rule in RULES if rule not in page] == []
