"""Texts of `gateway verify` in English and Korean. Pure.

A check is `check.NAME`, a group `group.NAME`, everything else a reason.
"""

from typing import Literal

from gateway.bench.verify import texts_en, texts_ko

Language = Literal["en", "ko"]

TEXTS: dict[Language, dict[str, str]] = {"en": texts_en.TEXTS, "ko": texts_ko.TEXTS}


def said(key: str, language: Language, **values: object) -> str:
    """Return a text with its values."""
    return TEXTS[language][key].format(**values)
