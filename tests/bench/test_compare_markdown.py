import re

import pytest

from gateway.bench.compare_markdown import filename, markdown
from gateway.bench.report_texts import Lang
from tests.bench.comparisons import cold, comparison, quality, side


def test_the_file_carries_the_time_of_the_measurement() -> None:
    assert filename(comparison()) == "performance_report_20261129_050607.md"


def test_the_better_value_is_bold_and_every_table_has_as_many_cells_as_its_header() -> None:
    a = side("A", gap=0.2, quality=quality(0.9), cold=(cold(16.31), cold(16.3)))
    b = side("B", quality=quality(0.2), cold=(cold(13.99), cold(14.0)))
    report = markdown(comparison(a, b))
    line = next(line for line in report.splitlines() if line.startswith("| Response time, median"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2].startswith("**")
    assert cells[-1] == "**B**"
    assert not cells[1].startswith("**")
    for table in re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE):
        assert len({len(re.split(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    assert "| **Mean** | **" in report
    assert "| Load time | 16.3" in report


def test_one_side_alone_has_a_column_of_its_own_and_no_better() -> None:
    report = markdown(comparison(side("A")))
    assert "| metric | A (model-A) |\n| --- | ---: |" in report
    assert "better |" not in report


@pytest.mark.parametrize("lang", ["en", "ko"])
def test_a_name_cannot_break_the_table(lang: Lang) -> None:
    report = markdown(comparison(side("A", model="a|b\nc"), side("B")), lang)
    assert "a\\|b c" in report


def test_facts_of_the_machine_are_there_and_korean_has_no_english_headings() -> None:
    report = markdown(comparison(), "ko", {"cpu": "Xeon", "cores": 2})
    assert "| 프로세서 | Xeon |" in report
    assert "## 초기 로딩" in report
    assert "better" not in report
