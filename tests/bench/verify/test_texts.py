"""Texts that the checks use exist, and none is left over.

Covers: gateway/bench/verify/texts_en.py
Covers: gateway/bench/verify/texts_ko.py
"""

import re
from pathlib import Path

from gateway.bench.verify.texts import TEXTS

FOLDER = Path(__file__).parents[3] / "gateway" / "bench" / "verify"
_KEY = re.compile(r'(?:Reason|CheckFailed|CheckSkipped)\(\s*"(\w+)"')


def test_every_reason_has_a_text_and_every_text_is_used() -> None:
    code = "\n".join(path.read_text() for path in FOLDER.glob("*.py") if not path.name.startswith("texts"))
    named = set(_KEY.findall(code)) | {"serial", "batched", "limited", "unclear"}
    assert named == {key for key in TEXTS["en"] if "." not in key} - {"summary", "heading"}
