"""Warnings about settings that work but are probably unintended. Pure."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from pydantic import SecretStr

from gateway.config.settings import BackendSettings, Settings, Tier

SHORT_KEY = 16  # characters; `openssl rand -hex 16` prints twice as many


def advice(settings: Settings) -> tuple[str, ...]:
    """Return one line for each setting that an operator should look at."""
    return (
        *_shared_models(settings),
        *_tiers(settings),
        *_auto(settings),
        *_backends(settings),
        *_sizes(settings),
        *_exclusive(settings),
        *_keys(settings),
    )


def _shared_models(settings: Settings) -> Iterator[str]:
    owners: dict[str, str] = {}
    for tier in settings.tiers.values():
        for model in dict.fromkeys(tier.models.values()):
            first = owners.setdefault(model, tier.name)
            if first != tier.name:
                yield (
                    f"tiers.{tier.name}.models: {model!r} is also a model of tier {first!r}; "
                    f"a request for that name is served by {first!r}"
                )


def _tiers(settings: Settings) -> Iterator[str]:
    for tier in settings.tiers.values():
        key = f"tiers.{tier.name}"
        if tier.fallback is True and len(tier.models) == 1:
            yield f"{key}.fallback: true, but only one backend has a model, so there is nothing to fall back to"
        if tier.backend is None and settings.rollback_to not in tier.models:
            yield f"{key}.models: no model for {settings.rollback_to!r}, so a rollback does not move this tier"
        for name in tier.limits:
            if name not in tier.models:
                yield f"{key}.limits.{name}: ignored: the tier has no model on this backend"


def _exclusive(settings: Settings) -> Iterator[str]:
    """Warn of what is not served while another engine has the GPU."""
    on_gpu = settings.on_gpu
    if not settings.exclusive:
        if any(item.stop for item in settings.backends.values()):
            yield "exclusive: false, so the commands stop and start of the backends are never run"
        return
    for tier in settings.tiers.values():
        key, names = f"tiers.{tier.name}", {tier.backend} if tier.backend else set(tier.models)
        if tier.backend in on_gpu:
            yield f"{key}.backend: its requests are refused while another engine has the GPU (exclusive)"
        if names & on_gpu and (tier.fallback is True or tier.fallback in on_gpu):
            others = [name for name in tier.models if name not in on_gpu]
            if tier.fallback is not True or not others:
                yield f"{key}.fallback: no effect: the other engines have no GPU meanwhile (exclusive)"
    for section, items in (("embeddings", settings.embeddings), ("rerankers", settings.rerankers)):
        for name, item in items.items():
            if item.backend in on_gpu:
                yield f"{section}.{name}: its requests are refused while another engine has the GPU (exclusive)"


def _auto(settings: Settings) -> Iterator[str]:
    """Warn of each rule that an earlier one with the same or fewer conditions shadows."""
    rules = [
        (rule.model_dump(exclude={"tier", "longer_than"}, exclude_none=True).items(), rule.longer_than)
        for rule in settings.auto
    ]
    for index, (conditions, length) in enumerate(rules):
        for before, (earlier_conditions, earlier_length) in enumerate(rules[:index]):
            is_shorter = earlier_length is None or (length is not None and earlier_length <= length)
            if earlier_conditions <= conditions and is_shorter:
                yield f"auto[{index}]: never reached: auto[{before}] holds whenever it does"
                break


def _reachable(tier: Tier) -> set[str]:
    if tier.backend is None or tier.fallback is True:
        return set(tier.models)
    return {tier.backend, tier.fallback} if isinstance(tier.fallback, str) else {tier.backend}


def _backends(settings: Settings) -> Iterator[str]:
    used = {item.backend for item in (*settings.embeddings.values(), *settings.rerankers.values())}
    used |= {backend.name for backend in settings.backends.values() if backend.discover}
    for tier in settings.tiers.values():
        used |= _reachable(tier)
    for backend in settings.backends.values():
        key = f"backends.{backend.name}"
        if backend.name not in used:
            yield f"{key}: no tier uses it"
        if any(_is_own_address(server.base_url, settings) for server in backend.servers):
            yield f"{key}: its address is the gateway's own; the gateway would send requests to itself"
        yield from _limits(key, backend)


def _limits(key: str, backend: BackendSettings) -> Iterator[str]:
    limits = backend.limits
    for name, given in (
        ("model_concurrency", limits.model_concurrency),
        ("vision_concurrency", limits.vision_concurrency),
    ):
        if given != "auto" and given > limits.max_concurrency:
            yield f"{key}.{name}: {given} is above max_concurrency, so the limit is {limits.max_concurrency}"


def _is_own_address(url: str, settings: Settings) -> bool:
    parts = urlsplit(url)
    local = parts.hostname in ("127.0.0.1", "localhost", "::1", settings.host)
    return local and parts.scheme in ("http", "dns") and (parts.port or 80) == settings.port


def _sizes(settings: Settings) -> Iterator[str]:
    if settings.max_waiting_bytes < settings.max_body:
        yield f"max_waiting_bytes: {settings.max_waiting_bytes} is below max_body; a larger body is always refused"


def _keys(settings: Settings) -> Iterator[str]:
    if settings.is_open:
        yield "GATEWAY_API_KEYS: not set, so the gateway is open: it accepts requests with any key or none"
    groups: tuple[tuple[str, tuple[SecretStr | None, ...]], ...] = (
        ("GATEWAY_API_KEYS", settings.api_keys),
        ("GATEWAY_ADMIN_KEY", (settings.admin_key,)),
        ("GATEWAY_METRICS_KEY", (settings.metrics_key,)),
    )
    for label, keys in groups:
        if any(key is not None and len(key.get_secret_value()) < SHORT_KEY for key in keys):
            yield f"{label}: a key has fewer than {SHORT_KEY} characters, so it could be guessed"
