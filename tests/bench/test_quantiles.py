import pytest

from gateway.bench.quantiles import deviation, mean, needed, percentile_word, quantile, supported_quantile


@pytest.mark.parametrize(
    ("percentile", "values"), [(25, 2), (50, 2), (75, 4), (90, 10), (95, 20), (99, 100), (99.9, 1000)]
)
def test_a_percentile_needs_as_many_values_as_put_one_at_or_beyond_it(percentile: float, values: int) -> None:
    assert needed(percentile) == values
    assert supported_quantile([1.0] * (values - 1), percentile) is None
    assert supported_quantile([1.0] * values, percentile) == 1.0


def test_percentiles_interpolate_as_numpy_does() -> None:
    """Values of numpy.percentile([4, 1, 3, 2, 9], q) for q = 0, 25, 50, 90, 99, 100."""
    found = [quantile([4, 1, 3, 2, 9], q) for q in (0, 25, 50, 90, 99, 100)]
    assert found == pytest.approx([1, 2, 3, 7, 8.8, 9])


def test_the_deviation_is_that_of_the_population() -> None:
    assert mean([2, 4, 4, 4, 5, 5, 7, 9]) == 5
    assert deviation([2, 4, 4, 4, 5, 5, 7, 9]) == 2


def test_nothing_has_no_mean() -> None:
    assert mean([]) is deviation([]) is quantile([], 50) is None


def test_a_percentile_is_written_as_vllm_writes_it() -> None:
    assert [percentile_word(value) for value in (50.0, 99.0, 99.9)] == ["50", "99", "99.9"]
