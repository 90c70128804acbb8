"""Meaning of a failed attempt for its server, decided without sockets.

`retry_seconds` and `check_headers` are tested too where the relay uses them, in tests/relay.
"""

from email.utils import formatdate
from time import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import pytest

from gateway.errors import (
    BackendUnavailable,
    GatewayError,
    InvalidRequest,
    ModelNotFound,
    QueueTimeout,
    SchemaTooComplex,
    UpstreamError,
    UpstreamTimeout,
)
from gateway.upstream.failures import (
    BROKEN_ANSWERS,
    BUSY,
    FULL_SECONDS,
    LONGEST_PAUSE,
    MISSING,
    SERVER_FAULTS,
    check_headers,
    record_failure,
    record_outlier,
    upstream_error,
    with_retry_after,
)
from gateway.upstream.outlier_detection import HANG
from gateway.upstream.transport_error import TransportError

EVENTS = b"text/event-stream"


def record(error: GatewayError, *, is_troubled: bool = True) -> tuple[str | None, Any, Any]:
    """Record `error` for a server. Return the reason for a retry, the backend and the server."""
    backend, server = MagicMock(), MagicMock()
    server.circuit.is_troubled = is_troubled
    return record_failure(backend, "llama", server, error, 100.0), backend, server


@pytest.mark.parametrize("reason", sorted(SERVER_FAULTS - {HANG}))
def test_fault_of_the_server_counts_in_its_circuit_and_may_be_retried(reason: str) -> None:
    result, _, server = record(UpstreamError(reason))
    assert result == reason
    server.circuit.fail.assert_called_once_with(reason, 100.0)


def test_request_that_left_a_hung_server_may_go_elsewhere_and_is_not_counted_again() -> None:
    result, _, server = record(UpstreamError(HANG))
    assert (result, server.circuit.fail.called) == (HANG, False)


def outlier_failures(error: GatewayError, *, is_open: bool = False) -> list[Any]:
    """Return the calls that `record_outlier` makes to the detector of a request on trial."""
    server, ticket = MagicMock(), MagicMock(is_trial=True)
    server.circuit.is_open = is_open
    record_outlier(server, ticket, error, 100.0)
    expected = [call.fail(error.reason, 100.0, ticket.claim, True)] if isinstance(error, UpstreamError) else []
    assert ticket.placement.gate.mock_calls in ([], expected)
    return list(ticket.placement.gate.mock_calls)


@pytest.mark.parametrize("reason", sorted(SERVER_FAULTS - {HANG} | BROKEN_ANSWERS))
def test_failure_and_broken_answer_count_towards_an_ejection_unless_the_server_is_known_to_be_dead(reason: str) -> None:
    assert outlier_failures(UpstreamError(reason))
    assert not outlier_failures(UpstreamError(reason), is_open=True)


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("too long"),
        BackendUnavailable("full"),
        ModelNotFound("no such model"),
        UpstreamError("auth"),
        UpstreamError("status_4xx"),
        UpstreamError(HANG),
    ],
    ids=lambda error: getattr(error, "reason", type(error).__name__),
)
def test_refusal_does_not_count_towards_an_ejection(error: GatewayError) -> None:
    assert not outlier_failures(error)


@pytest.mark.parametrize("reason", ["auth", "content_type", "malformed"])
def test_fault_of_the_settings_or_of_the_kind_of_server_counts_nowhere(reason: str) -> None:
    result, backend, server = record(UpstreamError(reason))
    assert result is None
    assert (backend.mock_calls, server.mock_calls) == ([], [])


@pytest.mark.parametrize(("pause", "seconds"), [(None, FULL_SECONDS), (7, 7), (0, 0)], ids=["no time", "time", "zero"])
def test_full_server_is_paused_for_the_time_that_it_names(pause: float | None, seconds: float) -> None:
    error = BackendUnavailable("full")
    error.pause = pause
    result, backend, server = record(error)
    assert result == BUSY
    backend.restraints.pause.assert_called_once_with(server, seconds)
    assert server.mock_calls == []


def test_model_that_the_server_denies_is_marked_as_missing() -> None:
    result, _, server = record(ModelNotFound("no such model"))
    assert result == MISSING
    server.mark_missing.assert_called_once_with("llama")


@pytest.mark.parametrize("is_troubled", [True, False], ids=["after failures", "without failures"])
def test_refused_request_shows_that_the_server_is_alive(is_troubled: bool) -> None:
    result, _, server = record(InvalidRequest("too long"), is_troubled=is_troubled)
    assert result is None
    assert server.circuit.succeed.called is is_troubled


@pytest.mark.parametrize("error", [UpstreamTimeout("no first token"), QueueTimeout("late")], ids=["upstream", "queue"])
def test_timeout_is_not_retried(error: GatewayError) -> None:
    result, backend, server = record(error)
    assert result is None
    assert (backend.mock_calls, server.mock_calls) == ([], [])


def answer(**fields: bytes) -> Any:
    return SimpleNamespace(fields={name.replace("_", "-").encode(): value for name, value in fields.items()})


@pytest.mark.parametrize(
    ("value", "pause", "retry_after"),
    [(b"7", 7, 7), (b"0", 0, 1), (b"9999", LONGEST_PAUSE, LONGEST_PAUSE), (b"soon", None, None)],
    ids=["seconds", "zero", "too long", "malformed"],
)
def test_retry_after_of_a_full_backend_is_the_pause_and_reaches_the_client(
    value: bytes, pause: int | None, retry_after: int | None
) -> None:
    error = BackendUnavailable("full")
    assert with_retry_after(error, answer(retry_after=value)) is error
    assert (error.pause, error.retry_after) == (pause, retry_after)


def test_retry_after_may_be_a_date() -> None:
    error = BackendUnavailable("full")
    with_retry_after(error, answer(retry_after=formatdate(time() + 30, usegmt=True).encode()))
    assert error.pause is not None
    assert 28 <= error.pause <= 30


def test_retry_after_of_any_other_error_is_ignored() -> None:
    error = UpstreamError("status_5xx")
    with_retry_after(error, answer(retry_after=b"7"))
    assert error.retry_after is None
    unavailable = BackendUnavailable("full", retry_after=3)
    with_retry_after(unavailable, answer())
    assert (unavailable.pause, unavailable.retry_after) == (None, 3)


@pytest.mark.parametrize(
    ("fields", "media_type", "streams"),
    [
        ({"content_type": b"application/json; charset=utf-8"}, b"application/json", False),
        ({}, b"application/json", False),
        ({"content_type": b"Text/Event-Stream"}, EVENTS, True),
        ({"content_encoding": b"Identity", "content_type": EVENTS}, EVENTS, True),
    ],
    ids=["JSON", "no type", "stream", "identity"],
)
def test_type_of_the_answer_says_whether_it_is_a_stream(
    fields: dict[str, bytes], media_type: bytes, streams: bool
) -> None:
    assert check_headers(answer(**fields), media_type) is streams


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"content_type": b"text/html"}, "content_type"),
        ({"content_type": b"application/json"}, "content_type"),
        ({"content_encoding": b"gzip", "content_type": EVENTS}, "content_encoding"),
    ],
    ids=["HTML", "plain answer", "compressed"],
)
def test_answer_of_another_type_or_encoding_is_an_error(fields: dict[str, bytes], reason: str) -> None:
    with pytest.raises(UpstreamError) as raised:
        check_headers(answer(**fields), EVENTS)
    assert raised.value.reason == reason


def test_failed_connection_is_an_upstream_error_with_its_fault_as_the_reason() -> None:
    assert upstream_error(TransportError("reset")).reason == "reset"


@pytest.mark.parametrize(
    ("error", "successes"), [(InvalidRequest("The backend refused it."), 1), (SchemaTooComplex("tools"), 0)]
)
def test_refusal_clears_a_troubled_server_only_if_the_server_has_answered(
    error: InvalidRequest, successes: int
) -> None:
    result, _, server = record(error)
    assert result is None
    assert server.circuit.succeed.call_count == successes
