import json
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.bench.compare import UnlikeWorkloads, UnreadableResult, Written, all_figures, figure_names, of_files
from tests.bench.comparisons import comparison, quality, side
from tests.bench.records import record, run


def saved(folder: Path, name: str, *sides: object) -> Path:
    path = folder / name
    path.write_text(Written(comparison(*sides), {}).json_text(), encoding="utf-8")  # type: ignore[arg-type]
    return path


def test_two_sides_that_were_measured_apart_are_compared_later(tmp_path: Path) -> None:
    a = saved(tmp_path, "a.json", side("A", gap=0.2, quality=quality(0.9)))
    b = saved(tmp_path, "b.json", side("B", quality=quality(0.2)))
    found = of_files([a, b]).comparison
    assert not found.in_turn
    assert all_figures(found)["a_worse"] == 5
    assert found.b is not None
    assert found.b.quality == quality(0.2)


def test_a_folder_stands_for_the_result_in_it(tmp_path: Path) -> None:
    saved(tmp_path, "compare_results.json", side("A", gap=0.2))
    bench = tmp_path / "bench"
    bench.mkdir()
    saved(bench, "benchmark_results.json", side("B"))
    assert [one.name for one in of_files([tmp_path, bench]).comparison.sides] == ["A", "B"]
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableResult, match=r"empty/compare_results\.json: No such file"):
        of_files([tmp_path, empty])


def test_unlike_workloads_are_refused_and_named(tmp_path: Path) -> None:
    a = saved(tmp_path, "a.json", side("A"))
    b = saved(tmp_path, "b.json", side("B", workload={"requests": 8, "requests_sha256": "ab" * 32}))
    with pytest.raises(UnlikeWorkloads) as caught:
        of_files([a, b])
    assert [str(one) for one in caught.value.fields] == ["requests: 4 in A, 8 in B"]
    forced = of_files([a, b], force=True).comparison
    assert forced.notes == ("forced:requests",)


def test_a_file_that_is_not_a_result_is_named(tmp_path: Path) -> None:
    good = saved(tmp_path, "a.json", side("A"))
    two = saved(tmp_path, "two.json", side("A"), side("B"))
    text = tmp_path / "text.json"
    text.write_text("{")
    failed = saved(tmp_path, "failed.json", replace(side("A"), rounds=(run([record(error="timeout", ttft=None)]),)))
    for bad, reason in (
        (tmp_path / "none.json", "No such file"),
        (text, "Expecting"),
        (two, "two sides already"),
        (failed, "no request was answered"),
    ):
        with pytest.raises(UnreadableResult, match=reason) as caught:
            of_files([good, bad])
        assert str(caught.value).startswith(str(bad))


def test_the_files_are_written_in_the_readers_language(tmp_path: Path) -> None:
    paths = Written(comparison(), {"cores": 2}).write(tmp_path / "new", "ko")
    assert [path.name for path in paths] == [
        "performance_report_20261129_050607.md",
        "report.html",
        "compare_results.json",
    ]
    assert "성능 비교 보고서" in paths[0].read_text(encoding="utf-8")
    assert '<html lang="ko">' in paths[1].read_text(encoding="utf-8")


def test_json_has_the_rows_with_their_intervals_and_the_recommendation() -> None:
    both = comparison(side("A", gap=0.2, quality=quality(0.9)), side("B", quality=quality(0.2)))
    value = json.loads(Written(both, {"cores": 2}).json_text())
    row = next(row for row in value["rows"] if row["key"] == "response")
    assert row["better"] == "B"
    assert row["interval"]["method"] == "paired"
    assert row["interval"]["low"] < row["ratio"] < row["interval"]["high"]
    assert value["quality_rows"][-1]["scenario"] == "mean"
    assert value["recommendation"] == "quality_prefer_a"
    assert value["figures"]["difference_quality"] < 0
    assert value["machine"] == {"cores": 2}


def test_quality_of_one_side_gives_no_difference() -> None:
    found = all_figures(comparison(side("A", quality=quality(0.9))))
    assert found["a_quality"] is not None
    assert found["b_quality"] is None
    assert "difference_quality" not in found


def test_the_figures_of_a_measurement_are_known_before_it() -> None:
    both = comparison(side("A", quality=quality(0.9)), side("B", quality=quality(0.2)))
    assert figure_names(2, has_quality=True) == sorted(all_figures(both))
    assert figure_names(2, has_quality=False) == sorted(all_figures(comparison()))
    assert figure_names(1, has_quality=False) == sorted(all_figures(comparison(side("A"))))
