import pytest

from gateway.bench.report_runs import (
    MOST_POINTS,
    NamedRun,
    distribution,
    over_time,
    pieces_by_second,
    thinned,
    throughput,
    timeline,
)
from tests.bench.records import record, run


def named(*records: object, name: str = "A", tone: int = 0, offset: float = 0.0) -> NamedRun:
    return NamedRun(name, run(records), tone, offset)  # type: ignore[arg-type]


def test_each_answer_is_a_point_at_the_second_in_which_it_was_sent() -> None:
    failed = record(2, start=103.0, error="timeout", ttft=None)
    chart = over_time([named(record(0), record(1, start=102.0, ttft=1.0), failed, offset=10.0)], "en")
    assert chart is not None
    assert list(chart.series[0].x) == [10, 12]
    assert list(chart.series[0].y) == pytest.approx([0.7, 1.2])


def test_runs_of_the_same_name_are_one_series() -> None:
    chart = over_time([named(record(0)), named(record(0), offset=5.0), named(record(0), name="B", tone=1)], "en")
    assert chart is not None
    assert [(one.name, len(one.x), one.tone) for one in chart.series] == [("A", 2, 0), ("B", 1, 1)]


def test_a_distribution_rises_to_100_percent() -> None:
    chart = distribution([named(*(record(i, ttft=float(i + 1), itl=[]) for i in range(4)))], "en", of="ttft")
    assert chart is not None
    assert list(chart.series[0].x) == [1, 2, 3, 4]
    assert list(chart.series[0].y) == [25, 50, 75, 100]
    assert chart.top == 100
    assert not chart.log


def test_a_wide_distribution_has_a_logarithmic_axis() -> None:
    chart = distribution([named(*(record(i, ttft=10.0**i, itl=[]) for i in range(4)))], "en", of="ttft")
    assert chart is not None
    assert chart.log


def test_three_answers_have_no_distribution() -> None:
    assert distribution([named(*(record(i) for i in range(3)))], "en") is None


def test_pieces_count_in_the_second_of_their_arrival() -> None:
    one = run([record(0, start=100.0, ttft=0.5, itl=[0.6, 0.1, 1.5])], duration=3.0)
    assert pieces_by_second(one) == [1, 2, 1]


def test_output_over_time_is_left_out_where_a_side_would_be_missing() -> None:
    long, short = named(record(0, itl=[1.0] * 5)), named(record(0), name="B", tone=1)
    chart = throughput([long, short], "en")
    assert chart is not None
    assert [one.name for one in chart.series] == ["A"]
    assert throughput([long, short], "en", needs_all=True) is None
    assert throughput([short], "en") is None


def test_a_timeline_has_a_bar_for_each_request_with_its_wait_and_its_failure() -> None:
    late = record(1, start=101.0, arrival=100.0, ttft=0.5, itl=[0.5])
    failed = record(2, start=102.0, error="timeout", ttft=None, itl=[1.0], name="a.png")
    found = timeline(named(record(0), late, failed), "en")
    assert found is not None
    assert [(span.name, span.due, span.start, span.first, span.failed) for span in found.spans] == [
        ("1", 0.0, 0.0, 0.5, False),
        ("2", 0.0, 1.0, 1.5, False),
        ("a.png", 2.0, 2.0, None, True),
    ]
    assert found.seconds == 3.0
    assert timeline(named(record(0)), "en") is None


def test_both_sides_can_have_the_same_scale() -> None:
    found = timeline(named(record(0), record(1)), "en", seconds=30.0)
    assert found is not None
    assert found.seconds == 30


def test_many_points_are_thinned_and_the_highest_stay() -> None:
    points = [(float(place), 1.0) for place in range(50_000)]
    points[31_337] = (31_337.0, 99.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 1
    assert (31_337.0, 99.0) in kept
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    chart = over_time([named(*(record(i, start=100 + i / 10) for i in range(MOST_POINTS + 500)))], "en")
    assert chart is not None
    assert "of 2500 requests" in chart.hint
