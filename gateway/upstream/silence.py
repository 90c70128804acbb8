"""Silence of a server on one connection, by which `liveness.py` finds lost requests. Decides, and awaits nothing."""

from gateway.upstream.connection import Connection


class Silence:
    """Silence on one connection while an answer is expected there.

    It is looked at in intervals: the connection itself only records that bytes have arrived. Times are
    in seconds on any clock, always the same one.
    """

    __slots__ = ("_connection", "_since", "_unsent_bytes")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._since: float | None = None
        self._unsent_bytes = 0

    def __repr__(self) -> str:
        return f"<Silence since {self._since} on {self._connection!r}>"

    def take_sign_of_life(self, now: float) -> bool:
        """Return whether the server has sent anything, or taken more of the request, since the last call."""
        connection = self._connection
        unsent = connection.unsent_bytes
        is_alive = connection.has_arrived or unsent < self._unsent_bytes
        connection.has_arrived, self._unsent_bytes = False, unsent
        if is_alive or connection.is_paused or not connection.is_busy:
            self._since = None
        elif self._since is None:
            self._since = now
        return is_alive

    def has_lasted_since(self, moment: float, *, has_begun: bool) -> bool:
        """Return whether the server has given no sign of life since `moment`, although an answer is expected.

        While the caller has paused the connection, nobody can tell. With `has_begun`, a part of the
        body has to have arrived before.
        """
        connection = self._connection
        return (
            self._since is not None
            and self._since <= moment
            and not connection.is_paused
            and connection.is_open
            and (connection.has_begun or not has_begun)
        )
