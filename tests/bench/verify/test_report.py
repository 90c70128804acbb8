"""Lines and JSON of a verification, in both languages."""

import json
import re
import string

import pytest

from gateway.bench.verify import texts_en, texts_ko
from gateway.bench.verify.outcome import GROUPS, Outcome, Reason
from gateway.bench.verify.report import as_json, heading, line, summary
from gateway.bench.verify.server_checks import REACH
from gateway.bench.verify.target import Target
from gateway.bench.verify.texts import TEXTS, said
from gateway.bench.verify.verification import CHECKS

OK = Outcome("streaming", "ends_with_done", "ok", None, 0.5)
FAILED = Outcome("korean", "returns_hangul", "failed", Reason("hangul_broken"), 1.0)
SKIPPED = Outcome("errors", "too_long", "skipped", Reason("context_too_long", {"tokens": 9}), 0.0)


def test_a_line_has_the_outcome_the_check_and_the_reason() -> None:
    assert line(OK, "en") == "ok      streaming: ends with [DONE]"
    assert line(FAILED, "en").startswith("failed  Korean: a Korean sentence comes back whole (the sentence came back")
    assert "컨텍스트가 9 토큰이라" in line(SKIPPED, "ko")


def test_the_summary_counts_each_outcome() -> None:
    assert summary([OK, OK, FAILED, SKIPPED], "en") == "2 ok, 1 failed, 1 skipped in 2.0 s"
    assert summary([OK, FAILED], "ko") == "정상 1건, 실패 1건, 건너뜀 0건 (1.5초)"


async def test_json_has_the_reasons_as_keys_with_their_values() -> None:
    async with Target("http://127.0.0.1:1", model="m", key=None) as target:
        target.model = "m"
        assert heading(target, "en") == "http://127.0.0.1:1, a server with OpenAI's API, model m"
        body = json.loads(json.dumps(as_json(target, [OK, SKIPPED], "en")))
    assert (body["ok"], body["failed"], body["skipped"]) == (1, 0, 1)
    assert body["checks"][0] | {"seconds": 0} == {
        "group": "streaming", "check": "ends_with_done", "status": "ok", "reason": None, "values": {}, "text": "",
        "seconds": 0,
    }  # fmt: skip
    assert (body["checks"][1]["reason"], body["checks"][1]["values"]) == ("context_too_long", {"tokens": 9})


def test_both_languages_have_the_same_texts_with_the_same_values() -> None:
    assert list(texts_en.TEXTS) == list(texts_ko.TEXTS)
    for key, text in texts_en.TEXTS.items():
        assert _fields(text) == _fields(texts_ko.TEXTS[key]), key


def _fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


LATIN = {"kind.ollama", "kind.vllm", "refused", "wrong_model_entry", "preflight_refused"}
"""Texts that are names, or a server's words alone."""


def test_korean_texts_are_korean() -> None:
    latin = {key for key, text in texts_ko.TEXTS.items() if not re.search("[가-힣]", text)}
    names_of_parameters = {
        key for key in latin if texts_ko.TEXTS[key] == texts_en.TEXTS[key] and key.startswith("check.")
    }
    assert latin - names_of_parameters == LATIN


@pytest.mark.parametrize("language", ["en", "ko"])
def test_every_check_and_group_has_a_name(language: str) -> None:
    texts = TEXTS[language]  # type: ignore[index]  # one of the two
    assert {f"check.{check.name}" for check in (*REACH, *CHECKS)} | {"check.preflight"} == {
        key for key in texts if key.startswith("check.")
    }
    assert {f"group.{group}" for group in GROUPS} == {key for key in texts if key.startswith("group.")}


def test_a_text_is_filled_in() -> None:
    assert said("no_models", "en").startswith("GET /v1/models lists no model")
    assert said("context", "ko", tokens=4096) == "컨텍스트 4096 토큰"
