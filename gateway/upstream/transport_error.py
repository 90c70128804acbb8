"""Failures of a connection to a server, by name. Pure."""

import errno
from typing import Literal

TransportFault = Literal[
    "connect", "connect_timeout", "closed", "reset", "unresponsive", "protocol", "truncated", "too_large"
]

_HOST_VANISHED = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH})
"""Errors with which the kernel gives up a connection (`socket_options.py`)."""


class TransportError(Exception):
    """Failure to connect, or of an exchange. `answered` is True if a byte of the answer had arrived."""

    def __init__(self, fault: TransportFault, answered: bool = False) -> None:
        super().__init__(fault)
        self.fault = fault
        self.answered = answered


def fault_of_end(exc: Exception | None, *, has_head: bool) -> TransportFault:
    """Return the fault of a connection that ended before its answer did.

    `exc` is the error that ended it; None if the server closed it. With `has_head`, the head of the
    answer had arrived.
    """
    if isinstance(exc, OSError) and exc.errno in _HOST_VANISHED:
        return "unresponsive"
    if has_head:
        return "truncated"
    return "closed" if exc is None else "reset"
