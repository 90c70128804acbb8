"""The switch for traces: OpenTelemetry's variables turn them on, and only then its SDK is imported."""

import logging
from collections.abc import Mapping

from gateway.telemetry.trace_context import Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTER = "OTEL_TRACES_EXPORTER"
DISABLED = "OTEL_SDK_DISABLED"
HTTP = "http/protobuf"

_log = logging.getLogger(__name__)


def start_tracing(environ: Mapping[str, str]) -> Tracer | None:
    """Return the tracer that the variables in `environ` ask for, or None.

    It has to be called in the event loop that serves.
    """
    wanted_by = _wanted_by(environ)
    if wanted_by is None:
        return None
    protocol = next((value for name in PROTOCOLS if (value := environ.get(name, "").strip())), HTTP)
    if protocol != HTTP:
        _log.warning("traces are off: OTLP is sent as %s, not as %r; change %s", HTTP, protocol, PROTOCOLS[1])
        return None
    try:
        from gateway.telemetry.otlp import OtlpTracer  # noqa: PLC0415  # takes 100 ms and 20 MB
    except ImportError:
        _log.warning("traces are off: %s is set, but the extra is not installed: pip install '.[otel]'", wanted_by)
        return None
    _log.info("traces are sent by OTLP, as %s asks", wanted_by)
    return OtlpTracer()


def _wanted_by(environ: Mapping[str, str]) -> str | None:
    """Return the variable that turns traces on, or None.

    As in OpenTelemetry's specification, an empty variable counts as unset.
    """
    exporters = [word.strip() for word in environ.get(EXPORTER, "").split(",") if word.strip()]
    if environ.get(DISABLED, "").strip().lower() == "true" or (exporters and "otlp" not in exporters):
        return None
    if exporters:
        return EXPORTER
    return next((name for name in ENDPOINTS if environ.get(name, "").strip()), None)
