"""Log messages about probes: in plain words what the first ones found, and what has changed since."""

import logging

from gateway.config import Settings
from gateway.upstream.backend import Backend
from gateway.upstream.probe import ProbeResult
from gateway.upstream.server import Server

MAX_LISTED = 8
"""Maximum number of models in a message."""
SHOWN_NAME = 80
"""Number of characters of a model's name that are logged."""

_log = logging.getLogger(__name__)


def report(settings: Settings, backend: Backend, server: Server, result: ProbeResult, why: str) -> None:
    """Log the result of a probe, and the models that the backend lacks if its servers have answered.

    `why` is the reason if the server is unreachable.
    """
    origin = server.pool.origin
    where = f"backend {server.name} ({backend.kind}) at {origin.authority}{origin.prefix}"
    if result == "up":
        models = sorted({name.removesuffix(":latest") for name in server.discovered or {}})
        _log.info("%s: reachable, models there: %s", where, _format_names(models))
        if len(backend.servers) == 1 or has_reported(backend):
            report_missing_models(settings, backend)
    elif result == "itself":
        _log.error(
            "%s: this is the gateway itself; set the address of the %s server, not the gateway's",
            where,
            backend.kind,
        )
    elif result == "refused_key":
        _log.error("%s: reachable, but it refuses the key; check the backend's api_key", where)
    elif result == "no_models":
        _log.error("%s: something answers there, but not a server of kind %s", where, backend.kind)
    else:
        _log.warning("%s: not reachable: %s; requests to it fail until it is", where, why)


def has_reported(backend: Backend) -> bool:
    """Return whether all servers of `backend` have reported their models."""
    return bool(backend.servers) and all(server.discovered is not None for server in backend.servers)


def report_missing_models(settings: Settings, backend: Backend) -> None:
    """Log the models that `settings` name on a backend and that none of its servers has."""
    wanted = [(f"tier {tier.name}", tier.models.get(backend.name)) for tier in settings.tiers.values()]
    wanted += [
        (f"embedding {name}", item.model) for name, item in settings.embeddings.items() if item.backend == backend.name
    ]
    wanted += [
        (f"reranker {name}", item.model) for name, item in settings.rerankers.items() if item.backend == backend.name
    ]
    for wanted_by, model in wanted:
        if model is not None and not any(server.serves(model) for server in backend.servers):
            available = sorted(
                {name.removesuffix(":latest") for server in backend.servers for name in server.discovered or {}}
            )
            _log.warning(
                "%s needs the model %r, which backend %s does not have; it has: %s",
                wanted_by,
                model,
                backend.name,
                _format_names(available),
            )


def _format_names(names: list[str]) -> str:
    """Format `names` for the log. A server could put line ends into its names, or send long ones."""
    if not names:
        return "none"
    listed = [_shorten(name if name.isprintable() else ascii(name)) for name in names[:MAX_LISTED]]
    return ", ".join(listed) + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


def _shorten(name: str) -> str:
    return name if len(name) <= SHOWN_NAME else f"{name[:SHOWN_NAME]}…"
