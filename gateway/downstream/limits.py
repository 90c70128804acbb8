"""Limits on the time and the header size that a client may use."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerLimits:
    """Limits on the time and the header size that a client may use; times in seconds.

    The body has `body_seconds` in all, plus a second for every 64 KiB that have arrived. Time in
    which the server itself pauses reading, because the application has left 64 KiB unread, does not
    count.
    """

    idle_seconds: float = 10
    """From accepting a connection to its first byte."""
    header_seconds: float = 10
    """From the first byte of a head to its end."""
    body_seconds: float = 30
    tight_seconds: float = 5
    """Interval at which the progress of a body is checked while much memory is in use.

    It must have brought 16 KiB for each second: a body that does not grow must not hold the memory
    that others need.
    """
    keep_alive_seconds: float = 75
    """From a response to the next request.

    Longer than clients and proxies commonly keep a connection (60).
    """
    write_stall_seconds: float = 60
    """Time in which the client takes no byte of the response; detected within a quarter more."""
    linger_seconds: float = 5
    """Time for reading the rest of a request that was answered before its end.

    Closing at once would reset the connection, and the client could lose the response.
    """
    max_header_bytes: int = 65536
    max_header_count: int = 100
