"""The cost of a key: that every kind of limits is measured; the values depend on the machine."""

from benchmarks.key_cost import KINDS, cost_of_keys, report


def test_cost_of_each_kind_of_key_is_measured() -> None:
    costs = cost_of_keys(rounds=2, requests=3)
    assert list(costs) == list(KINDS)
    assert all(0 < cost < 1_000_000 for cost in costs.values())


def test_report_has_a_line_for_each_kind() -> None:
    assert [line.split(":")[0] for line in report()] == [f"a key with {kind}" for kind in KINDS]
