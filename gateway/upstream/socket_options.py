"""Socket options with which the kernel detects that a server's host has vanished.

A host that loses power or its network sends neither FIN nor RST. On a silent connection, the kernel
then probes it (SO_KEEPALIVE, RFC 9293 section 3.8.4), and on one with unacknowledged data it gives
up after TCP_USER_TIMEOUT (RFC 5482). The connection fails within about `SILENT_SECONDS`.
"""

import socket
from contextlib import suppress
from typing import Protocol

SILENT_SECONDS = 20
"""Seconds without an acknowledgement after which the kernel closes a connection."""
FIRST_PROBE_SECONDS = 10
PROBE_SECONDS = 5

_TCP_OPTIONS = {
    "TCP_KEEPIDLE": FIRST_PROBE_SECONDS,
    "TCP_KEEPALIVE": FIRST_PROBE_SECONDS,  # the name of TCP_KEEPIDLE on macOS
    "TCP_KEEPINTVL": PROBE_SECONDS,
    "TCP_KEEPCNT": (SILENT_SECONDS - FIRST_PROBE_SECONDS) // PROBE_SECONDS,
    "TCP_USER_TIMEOUT": SILENT_SECONDS * 1000,  # only Linux has it, in milliseconds
}

OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in _TCP_OPTIONS.items()
        if hasattr(socket, name)
    ),
)
"""Options of this platform, as arguments of `setsockopt`."""


class Socket(Protocol):
    def setsockopt(self, level: int, optname: int, value: int, /) -> None: ...


def set_keep_alive(sock: Socket) -> None:
    """Set `OPTIONS` on a TCP socket. An option that the system refuses stays as it is."""
    for option in OPTIONS:
        with suppress(OSError):
            sock.setsockopt(*option)
