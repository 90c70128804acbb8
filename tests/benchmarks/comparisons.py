"""Comparisons for the tests of the cost benchmark."""

from benchmarks.report import OURS, THEIRS, Comparison, Target


def comparison(ours: list[float], theirs: list[float], nominal_rate: float | None = None) -> Comparison:
    """Return a comparison with a target of 0.8 and these values, each under a load of 100/s."""
    table = Comparison("title", "µs", Target(0.8), nominal_rate)
    for name, values in ((OURS, ours), (THEIRS, theirs)):
        for value in values:
            table.add(name, value, 100)
    return table
