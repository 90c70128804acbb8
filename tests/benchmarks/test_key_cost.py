"""The cost of a limited key: that it is measured; its value depends on the machine."""

from benchmarks.key_cost import cost_of_a_limited_key


def test_cost_of_a_limited_key_is_measured() -> None:
    assert 0 < cost_of_a_limited_key(rounds=2, requests=3) < 1_000_000
