"""Texts of `gateway advise` in English and Korean. Pure."""

from typing import Literal

from gateway.bench.advise import texts_en, texts_ko

Language = Literal["en", "ko"]

TEXTS: dict[Language, dict[str, str]] = {"en": texts_en.TEXTS, "ko": texts_ko.TEXTS}


def said(key: str, language: Language, **figures: object) -> str:
    """Return a text with its figures."""
    return TEXTS[language][key].format(**figures)
