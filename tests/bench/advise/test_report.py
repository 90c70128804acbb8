"""Report of the advice, in both languages.

Covers: gateway/bench/advise/texts.py
Covers: gateway/bench/advise/texts_en.py
Covers: gateway/bench/advise/texts_ko.py
"""

import io
import json
import re
import string
from pathlib import Path

import pytest
from rich.console import Console

from gateway.bench.advise import texts_en, texts_ko
from gateway.bench.advise.advice import Wishes, from_levels
from gateway.bench.advise.levels import levels_of
from gateway.bench.advise.report import as_json, show
from gateway.bench.advise.sources import cost_remarks
from gateway.bench.advise.target import Target
from gateway.bench.advise.texts import Language
from tests.bench.advise.machine import result

FOLDER = Path(__file__).parents[3] / "gateway" / "bench" / "advise"
TARGETS = (Target.parse("p95_ttft_ms<1000"),)
ADVICE = from_levels(levels_of(result(), TARGETS), Wishes(targets=TARGETS, users=6), "vllm")


@pytest.mark.parametrize(
    ("language", "words"),
    [
        (
            "en",
            ["[measured] p95_ttft_ms<1000: met up to 4 at once", "patience × rate: 0.8 s × 4.0", "The target is met"],
        ),
        ("ko", ["[측정] p95_ttft_ms<1000: 동시 4건까지 충족", "대기 허용 시간 × 처리율", "목표를 충족합니다", "계산"]),
    ],
)
def test_figures_settings_and_verdict_are_printed(language: Language, words: list[str]) -> None:
    out = io.StringIO()
    show(ADVICE, cost_remarks(10, None, 2), language, Console(file=out, width=200))
    assert not [word for word in [*words, "max_queue", "20 %"] if word not in out.getvalue()], out.getvalue()


def test_json_has_values_origins_and_texts() -> None:
    body = json.loads(json.dumps(as_json(ADVICE, [], "en")))
    assert body["meets"] is True
    by_name = {setting["name"]: setting for setting in body["settings"]}
    assert (by_name["max_concurrency"]["value"], by_name["max_concurrency"]["origin"]) == (4, "measured")
    assert by_name["max_queue"]["figures"]["patience"] == pytest.approx(0.8)
    assert all(item["text"] for item in [*body["settings"], *body["remarks"]])


def test_both_languages_have_the_same_texts_with_the_same_figures() -> None:
    assert list(texts_en.TEXTS) == list(texts_ko.TEXTS)
    for key, text in texts_en.TEXTS.items():
        assert _fields(text) == _fields(texts_ko.TEXTS[key]), key


def _fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_text_is_used_and_every_key_has_one() -> None:
    code = "\n".join(path.read_text() for path in FOLDER.glob("*.py") if not path.name.startswith("texts"))
    named = set(re.findall(r'"([a-z_]+)"', code))
    assert {key for key in texts_en.TEXTS if key not in named} == set()
    keys = re.findall(r'(?:Remark\(|Setting\([^,]+, [^,]+,|said\()\s*"(\w+)"', code)
    assert set(keys) <= set(texts_en.TEXTS)
