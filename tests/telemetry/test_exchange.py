"""The meter of one exchange: phases, times, and gaps between tokens."""

from gateway.telemetry.exchange import Meter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def meter() -> tuple[Meter, Clock, list[tuple[float, int]]]:
    clock, gaps = Clock(), list[tuple[float, int]]()
    return Meter(clock, lambda seconds, tokens: gaps.append((seconds, tokens))), clock, gaps


def test_phase_follows_the_steps_of_a_request() -> None:
    one, _, _ = meter()
    assert one.phase == "queued"
    one.admit()
    one.start_attempt()
    assert one.phase == "waiting"
    one.piece(1)
    assert one.phase == "streaming"


def test_steps_that_never_happened_have_no_time() -> None:
    one, clock, _ = meter()
    clock.now += 5
    one.end_upstream()
    assert (one.times(), one.attempts) == ((5, None, 0.0, None), 0)


def test_time_in_the_queue_counts_towards_the_first_token_and_not_towards_the_upstream() -> None:
    one, clock, _ = meter()
    clock.now += 3
    one.admit()
    one.start_attempt()
    clock.now += 2
    one.piece(1)
    clock.now += 4
    one.end_upstream()
    assert one.times() == (9, 3, 6, 5)


def test_time_at_the_upstream_starts_with_the_first_attempt() -> None:
    one, clock, _ = meter()
    one.admit()
    one.start_attempt()
    clock.now += 1
    one.start_attempt()
    assert (one.attempts, one.sent, one.last_piece) == (2, 100.0, 101.0)


def test_gap_is_measured_between_pieces_and_reported_once_for_tokens_that_arrive_together() -> None:
    one, clock, gaps = meter()
    one.start_attempt()
    for seconds, tokens in ((7, 1), (0.5, 1), (0.25, 3)):
        clock.now += seconds
        one.piece(tokens)
    assert gaps == [(0.5, 1), (0.25, 3)]


def test_first_piece_with_several_tokens_reports_a_gap_of_zero_for_all_but_the_first() -> None:
    one, _, gaps = meter()
    one.piece(3)
    assert gaps == [(0.0, 2)]


def test_piece_without_tokens_reports_no_gap() -> None:
    """Such a piece has only a finish reason; it may be the first or the last one."""
    one, clock, gaps = meter()
    one.piece(0)
    clock.now += 1
    one.piece(0)
    assert gaps == []
    assert (one.times()[3], one.last_piece) == (0.0, 101.0)


def test_times_begin_anew_when_the_request_is_queued_again() -> None:
    """After a fallback, the time in the queue includes the failed attempt, and the upstream's does not."""
    one, clock, _ = meter()
    clock.now += 1
    one.admit()
    one.start_attempt()
    clock.now += 2
    one.end_upstream()
    one.requeue()
    assert (one.phase, one.times(), one.attempts) == ("queued", (3, None, 0.0, None), 1)
    one.end_upstream()
    assert one.times() == (3, None, 0.0, None)
    clock.now += 4
    one.admit()
    one.start_attempt()
    assert (one.phase, one.times()) == ("waiting", (7, 7, 0.0, None))
    clock.now += 8
    one.piece(1)
    one.end_upstream()
    assert (one.times(), one.attempts) == ((15, 7, 8, 15), 2)
