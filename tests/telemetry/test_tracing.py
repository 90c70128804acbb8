"""OpenTelemetry's variables turn traces on; without them its SDK is not imported."""

import logging
import subprocess
import sys

import pytest

from gateway.telemetry import tracing
from gateway.telemetry.otlp import OtlpTracer
from gateway.telemetry.tracing import start_tracing

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}

OFF = """
import sys
import gateway.app, gateway.serve, gateway.cli.commands
from gateway.telemetry.tracing import start_tracing
assert start_tracing({}) is None
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "google"))])
"""


def test_sdk_is_not_imported_without_the_variables() -> None:
    done = subprocess.run([sys.executable, "-c", OFF], capture_output=True, text=True, timeout=50)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:1"},
        {**ENDPOINT, "OTEL_SDK_DISABLED": "TRUE"},
        {**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"},
        {**ENDPOINT, "OTEL_TRACES_EXPORTER": "console"},
    ],
)
async def test_traces_stay_off(environ: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    assert start_tracing(environ) is None
    assert caplog.messages == []


@pytest.mark.parametrize(
    "environ",
    [
        ENDPOINT,
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces"},
        {"OTEL_TRACES_EXPORTER": "otlp"},
        {**ENDPOINT, "OTEL_TRACES_EXPORTER": "console, otlp"},
        {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_SDK_DISABLED": "no"},
        {
            **ENDPOINT,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        },
    ],
)
async def test_variables_turn_traces_on(environ: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tracer = start_tracing(environ)
    assert isinstance(tracer, OtlpTracer)
    assert [message for message in caplog.messages if message.startswith("traces are sent by OTLP, as OTEL_")]
    await tracer.close()


async def test_other_protocol_is_refused_in_words(caplog: pytest.LogCaptureFixture) -> None:
    assert start_tracing({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}) is None
    assert "OTEL_EXPORTER_OTLP_PROTOCOL" in caplog.text
    assert "'grpc'" in caplog.text


async def test_missing_extra_is_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gateway.telemetry.otlp", None)
    assert tracing.start_tracing(ENDPOINT) is None
    assert "[otel]" in caplog.text
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in caplog.text
