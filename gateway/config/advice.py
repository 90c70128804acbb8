"""Settings that work but are likely not what was meant. Pure: a function of the settings."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from pydantic import SecretStr

from gateway.config.settings import BackendSettings, Settings, Tier

SHORT_KEY = 16  # characters; `openssl rand -hex 16` gives twice as many


def advice(settings: Settings) -> tuple[str, ...]:
    """One line for each thing that an operator should look at."""
    return (*_shared_models(settings), *_tiers(settings), *_auto(settings), *_backends(settings), *_keys(settings))


def _shared_models(settings: Settings) -> Iterator[str]:
    owners: dict[str, str] = {}
    for tier in settings.tiers.values():
        for model in dict.fromkeys(tier.models.values()):
            first = owners.setdefault(model, tier.name)
            if first != tier.name:
                yield f"tiers.{tier.name}.models: {model!r} stands in tier {first!r} too; a request for that name means {first!r}"


def _tiers(settings: Settings) -> Iterator[str]:
    for tier in settings.tiers.values():
        key = f"tiers.{tier.name}"
        if tier.fallback is True and len(tier.models) == 1:
            yield f"{key}.fallback: true, but only one backend has a model, so nothing can take over"
        if tier.backend is None and settings.rollback_to not in tier.models:
            yield f"{key}.models: none for {settings.rollback_to!r}, so a rollback leaves this tier where it is"
        for name in tier.limits:
            if name not in tier.models:
                yield f"{key}.limits.{name}: not used: the tier has no model there"


def _auto(settings: Settings) -> Iterator[str]:
    """An earlier rule that asks for less, or for the same, holds wherever a later one does."""
    said = [
        (rule.model_dump(exclude={"tier", "longer_than"}, exclude_none=True).items(), rule.longer_than)
        for rule in settings.auto
    ]
    for index, (asked, length) in enumerate(said):
        for before, (earlier, shorter) in enumerate(said[:index]):
            if earlier <= asked and (shorter is None or (length is not None and shorter <= length)):
                yield f"auto[{index}]: never reached: wherever it holds, auto[{before}] does"
                break


def _reachable(tier: Tier) -> set[str]:
    if tier.backend is None or tier.fallback is True:
        return set(tier.models)
    return {tier.backend, tier.fallback} if isinstance(tier.fallback, str) else {tier.backend}


def _backends(settings: Settings) -> Iterator[str]:
    used = {item.backend for item in settings.embeddings.values()}
    for tier in settings.tiers.values():
        used |= _reachable(tier)
    for backend in settings.backends.values():
        key = f"backends.{backend.name}"
        if backend.name not in used:
            yield f"{key}: no tier uses it"
        if any(_is_own_address(server.base_url, settings) for server in backend.servers):
            yield f"{key}: its address is this gateway's own; requests would go in a circle"
        yield from _limits(key, backend)


def _limits(key: str, backend: BackendSettings) -> Iterator[str]:
    limits = backend.limits
    for name, given in (
        ("model_concurrency", limits.model_concurrency),
        ("vision_concurrency", limits.vision_concurrency),
    ):
        if given != "auto" and given > limits.max_concurrency:
            yield f"{key}.{name}: {given} is above max_concurrency, which is {limits.max_concurrency} and counts"


def _is_own_address(url: str, settings: Settings) -> bool:
    parts = urlsplit(url)
    local = parts.hostname in ("127.0.0.1", "localhost", "::1", settings.host)
    return local and parts.scheme == "http" and (parts.port or 80) == settings.port


def _keys(settings: Settings) -> Iterator[str]:
    if not settings.api_keys:
        yield "GATEWAY_API_KEYS: not set, so the gateway is open: it accepts requests with any key or none"
    groups: tuple[tuple[str, tuple[SecretStr | None, ...]], ...] = (
        ("GATEWAY_API_KEYS", settings.api_keys),
        ("GATEWAY_ADMIN_KEY", (settings.admin_key,)),
        ("GATEWAY_METRICS_KEY", (settings.metrics_key,)),
    )
    for label, keys in groups:
        if any(key is not None and len(key.get_secret_value()) < SHORT_KEY for key in keys):
            yield f"{label}: a key has fewer than {SHORT_KEY} characters and can be guessed"
