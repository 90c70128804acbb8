"""Frozen models: finds a model of an Ollama that answers nothing any more, and has it unloaded.

Ollama 0.24 and 0.33 can freeze one model when many clients leave at once: a callback waits for a
client that has left, and keeps one of the model's slots (`ch <- res` in server/routes.go). The
server, `/api/ps` and other models still answer, but no request for that model does, until the model
is unloaded. Ollama unloads it only once it has no requests left, so the gateway ends them, and sends
those without a first token again.

Rules. Ollama tells nothing while it evaluates a prompt, or while it holds back a tool call. A model
counts as frozen if nothing has come from any of its requests

1. while at least two requests wait for it, for longer than each of those in flight can be expected
   to take (`ModelActivity.patience`), and none of them has tools, and no model is being loaded; or
2. when a request has used up its `first_token_timeout` and would fail, for that long, or for
   `LEAST_PATIENCE` if that is shorter.

In both cases, the server has to be healthy, and to answer that the model is loaded: a model that is
being loaded is not listed. Prompts are evaluated only after the load, so a model that was not listed
has the same time again from then on. While rule 1 applies, the server is asked at each check. A client
that does not read makes Ollama wait, so while there is one, the model does not count as silent.

A model that has sent nothing since it was unloaded is not unloaded again. Its requests then fail by
their time-outs, which count for the circuit breaker.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from gateway.admission.model_activity import LEAST_PATIENCE
from gateway.admission.model_state import ModelState
from gateway.errors import GatewayError, UpstreamTimeout
from gateway.upstream.backend import Backend
from gateway.upstream.failures import NO_NEXT_PIECE
from gateway.upstream.server import Server

CHECK_SECONDS = 1.0

SHORTEST_TIMEOUT = 10.0
"""Seconds. A shorter `first_token_timeout` says nothing about the model when it passes."""


class ModelRequest(Protocol):
    """A relay whose request may be in flight at a server that loads models."""

    @property
    def arrived(self) -> float: ...
    @property
    def model_state(self) -> ModelState | None: ...
    @property
    def place(self) -> tuple[Backend, Server]:
        """Backend and server of the request in flight."""

    @property
    def sent_at(self) -> float: ...
    @property
    def first_token_timeout(self) -> float: ...
    @property
    def awaits_first_token(self) -> bool: ...
    @property
    def may_be_silent(self) -> bool:
        """True if the engine may hold back output for a long time."""

    @property
    def patience(self) -> float:
        """Seconds in which a first token is to be expected."""

    def last_heard(self, now: float) -> float:
        """Return the time of the last piece of the answer, or `now` if the client does not read."""

    def send_again(self, *, is_first: bool = True) -> bool:
        """Send the request again, from the queue on, if its answer has not begun."""

    def cut_off(self, error: GatewayError) -> None: ...


class FrozenModels:
    """Watch over the models that requests are in flight for.

    `requests` iterates over all relays in flight. `clock` is theirs.
    """

    def __init__(self, requests: Iterable[ModelRequest], clock: Callable[[], float]) -> None:
        self._requests = requests
        self._clock = clock
        self._check_at = 0.0
        self._unloads: dict[ModelState, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"<FrozenModels, unloading {list(self._unloads)}>"

    def check(self, now: float) -> None:
        """Have the models unloaded that rule 1 finds frozen. Cheap if the last check was just now."""
        if now < self._check_at:
            return
        self._check_at = now + CHECK_SECONDS
        by_model: dict[ModelState, list[ModelRequest]] = defaultdict(list)
        for request in self._requests:
            if request.model_state is not None:
                by_model[request.model_state].append(request)
        for state, requests in by_model.items():
            _hear(state, requests, now)
            if self._is_silent_too_long(state, requests, now):
                needed = max(LEAST_PATIENCE, *(request.patience for request in requests if request.awaits_first_token))
                self._unload(state, requests[0], None, needed)

    def is_deciding(self, request: ModelRequest) -> bool:
        """Return whether the model of `request` is being examined or unloaded."""
        return request.model_state in self._unloads

    def suspect(self, late: ModelRequest) -> None:
        """Have the model of `late`, whose `first_token_timeout` has passed, unloaded by rule 2."""
        state, now, timeout = late.model_state, self._clock(), late.first_token_timeout
        if state is None or state in self._unloads or timeout < SHORTEST_TIMEOUT:
            return
        requests = self._requests_for(state)
        _hear(state, requests, now)
        holds_back = any(request.may_be_silent and not request.awaits_first_token for request in requests)
        needed = timeout if holds_back else min(LEAST_PATIENCE, timeout)
        if now - max(state.activity.last_heard, late.sent_at) >= needed and _may_unload(state, late):
            self._unload(state, late, late, needed)

    def _requests_for(self, state: ModelState) -> list[ModelRequest]:
        return [request for request in self._requests if request.model_state is state]

    def _is_silent_too_long(self, state: ModelState, requests: list[ModelRequest], now: float) -> bool:
        waiting = [request for request in requests if request.awaits_first_token]
        if not waiting or len(waiting) + sum(queue.waiting for queue in state.waiters) < 2:
            return False
        since = max(state.activity.last_heard, min(request.sent_at for request in waiting))
        if now - since < LEAST_PATIENCE or any(request.may_be_silent for request in requests):
            return False
        return (
            now - since >= max(request.patience for request in waiting)
            and state not in self._unloads
            and _may_unload(state, waiting[0])
            and not _is_loading_any(waiting[0])
        )

    def _unload(self, state: ModelState, request: ModelRequest, late: ModelRequest | None, needed: float) -> None:
        """Have a model unloaded that is silent, if it has been loaded for `needed` seconds as far as is known."""
        backend, server = request.place
        if backend.unload_frozen is None:
            return
        heard = state.activity.last_heard
        task = backend.unload_frozen(
            server,
            state,
            partial(self._is_still_silent, state, heard, needed),
            partial(self._end_requests, state, late),
        )
        if task is not None:
            self._unloads[state] = task
            task.add_done_callback(lambda _: self._unloads.pop(state))

    def _is_still_silent(self, state: ModelState, heard: float, needed: float) -> bool:
        requests, now, activity = self._requests_for(state), self._clock(), state.activity
        _hear(state, requests, now)
        has_had_time = now - activity.missing_at >= needed
        return has_had_time and activity.last_heard == heard and any(request.awaits_first_token for request in requests)

    def _end_requests(self, state: ModelState, late: ModelRequest | None) -> str:
        """End the requests for the model at the server. Return what to log about them.

        `late` may have kept the engine busy for all of its time, so it goes last.
        """
        requests = sorted(self._requests_for(state), key=lambda request: request.arrived, reverse=True)
        again = [request for request in requests if request.send_again(is_first=request is not late)]
        stalled = [request for request in requests if request not in again]
        for request in stalled:
            request.cut_off(UpstreamTimeout(NO_NEXT_PIECE))
        return f"requests sent again: {len(again)}, answers broken off: {len(stalled)}"


def _hear(state: ModelState, requests: list[ModelRequest], now: float) -> None:
    heard = max((request.last_heard(now) for request in requests), default=state.activity.last_heard)
    if heard > state.activity.last_heard:
        state.activity.hear(heard)


def _may_unload(state: ModelState, request: ModelRequest) -> bool:
    """Return whether the server is healthy, and unloading the model may help."""
    _, server = request.place
    return (
        server.up is True
        and server.circuit.state == "closed"
        and not state.activity.was_unloaded
        and not state.is_unloading
    )


def _is_loading_any(request: ModelRequest) -> bool:
    residency = request.place[1].residency
    return residency is not None and any(state.is_loading for state in residency.states.values())
