"""Failures of a connection: their names."""

import errno

import pytest

from gateway.upstream.transport_error import TransportError, TransportFault, fault_of_end


@pytest.mark.parametrize(
    ("exc", "has_head", "fault"),
    [
        (None, False, "closed"),
        (None, True, "truncated"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), False, "reset"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True, "truncated"),
        (EOFError(), False, "reset"),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), False, "unresponsive"),
        (OSError(errno.EHOSTUNREACH, "no route to host"), True, "unresponsive"),
    ],
)
def test_end_of_a_connection_is_named_after_its_cause(
    exc: Exception | None, has_head: bool, fault: TransportFault
) -> None:
    assert fault_of_end(exc, has_head=has_head) == fault


def test_error_shows_its_fault() -> None:
    error = TransportError("reset", answered=True)
    assert (str(error), error.fault, error.answered) == ("reset", "reset", True)
