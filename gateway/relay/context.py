"""The context that all relays share."""

import asyncio
import time
from collections.abc import Callable, Mapping

from gateway.body_memory import BodyMemory
from gateway.config import Settings
from gateway.relay.destinations import Destination, Destinations
from gateway.relay.frozen_models import FrozenModels
from gateway.relay.in_flight import InFlight, Requeueable
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.recording import TrafficRecording
from gateway.telemetry.trace_context import Trace, pass_on


class RelayContext:
    """Destinations, settings, clock, metrics and the registry of relays in flight.

    It is built in the event loop that the relays run in.

    - `requeue_target` returns the destination for a chat that is about to queue again, or None if
      the chat stays at the one that it has.
    - `on_exchange` receives the record of each exchange when it ends, and its attribution if it has one.
    - `traffic` records the sizes of exchanges, while the settings name a file for them.
    - `body_memory` counts the request bodies that are read or wait.
    - `begin_trace` returns the trace of a request with these header fields, None if it has none.
    - `gateway_id` identifies this gateway to others, so that a request cannot go round in a loop.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        destinations: Destinations,
        in_flight: InFlight,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        requeue_target: Callable[[Requeueable], Destination | None],
        on_exchange: Callable[..., None],
        body_memory: BodyMemory,
        gateway_id: bytes,
        traffic: TrafficRecording | None = None,
        begin_trace: Callable[[Mapping[bytes, bytes]], Trace | None] = pass_on,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.clock = clock
        self.destination = destinations.get  # bound once: it costs a request one look-up
        self.backends = destinations.backends
        self.in_flight = in_flight
        self.frozen_models = FrozenModels(in_flight, clock)
        in_flight.watch = self.frozen_models.check
        self.metrics = metrics
        self.requeue_target = requeue_target
        self.on_exchange = on_exchange
        self.body_memory = body_memory
        self.gateway_id = gateway_id
        self._traffic = traffic
        self.begin_trace = begin_trace
        self.change(settings)

    def change(self, settings: Settings) -> None:
        """Put `settings` in force."""
        self.settings = settings
        self.max_text_body = settings.max_text_body
        self.commit_after = settings.commit_after
        self.heartbeat = settings.heartbeat
        self.waiting_note = settings.waiting_note
        self.recording = None if self._traffic is None else self._traffic.to(settings.record, settings.record_size)
        self.body_memory.change(
            settings.max_waiting_bytes, is_shared=len(settings.api_keys) > 1 or settings.keys_file is not None
        )
