"""An `Admission`, as the limits see it that several replicas share."""

from collections.abc import Collection, Iterable
from typing import Protocol

from gateway.admission.concurrency_limits import ConcurrencyLimit
from gateway.admission.queues import Queue


class Admitting(Protocol):
    """Queues of one backend, and the limits that their requests need."""

    @property
    def queues(self) -> Collection[Queue]: ...

    def used_limits(self) -> Iterable[ConcurrencyLimit]:
        """Return the limits that its requests need."""
        ...

    def refresh(self) -> None:
        """Admit the requests that can run now."""
        ...
