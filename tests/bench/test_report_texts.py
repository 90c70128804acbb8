import string

import pytest

from gateway.bench import texts
from gateway.bench.compare_texts import COMPARE_TEXTS
from gateway.bench.report_texts import _TEXTS, Lang, date, digits, number, text


def test_every_text_has_two_languages_with_the_same_figures() -> None:
    for key, (english, korean) in _TEXTS.items():
        fields = [
            sorted(name for _, name, _, _ in string.Formatter().parse(words) if name) for words in (english, korean)
        ]
        assert fields[0] == fields[1], key


def test_no_text_of_the_report_hides_one_of_the_scenarios() -> None:
    """`measured`, `computed` and `forecast` are marks here, and mean the same."""
    hidden = {key for key in {**_TEXTS, **COMPARE_TEXTS} if texts.has(key)}
    assert hidden <= {"measured", "computed", "forecast"}
    assert not set(_TEXTS) & set(COMPARE_TEXTS)


def test_a_key_without_a_text_is_shown_as_words() -> None:
    assert text("http_503 queue_full", "en") == "http 503 queue full"


def test_a_scenarios_text_is_filled_in_and_left_as_it_is_without_its_figures() -> None:
    assert text("no_gain", "en", n=5, speedup=1.0).startswith("5 at once")
    assert text("no_gain", "en", other=1) == texts.text("no_gain", "en")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (0.0, "0"), (5, "5"), (12345, "12,345"), (1234.5, "1,234"), (397.2, "397.2"), (255.0, "255"),
        (51.04, "51.04"), (0.642, "0.64"), (0.05, "0.050"), (0.00004, "4.0e-05"), (-2.318, "-2.32"), (100, "100"),
    ],
)  # fmt: skip
def test_numbers_have_about_three_digits(value: float, shown: str) -> None:
    assert digits(value) == shown


@pytest.mark.parametrize(
    ("value", "unit", "lang", "shown"),
    [
        (51.0, "s", "en", "51.00 s"),
        (51.0, "s", "ko", "51.00초"),
        (3.0, "x", "ko", "3.00배"),
        (30.14, "tok/s", "en", "30.14 tok/s"),
        (None, "s", "en", "–"),
        ("5-10", "", "ko", "5-10"),
        (7, "n", "en", "7"),
    ],
)
def test_numbers_have_their_unit_in_the_readers_language(value: object, unit: str, lang: Lang, shown: str) -> None:
    assert number(value, unit, lang) == shown  # type: ignore[arg-type]


def test_a_date_is_readable_and_another_text_stays() -> None:
    assert date("20261129-050607") == "2026-11-29 05:06:07"
    assert date("yesterday") == "yesterday"
    assert date("") == ""
