"""Resolution of the section `tiers`: models, overrides, fallbacks and parameters. Pure."""

from collections.abc import Mapping

from gateway.chat.parameter_policy import problem as parameter_problem
from gateway.config.document_tiers import TierDocument
from gateway.config.problems import Path, Problems, expected_one_of
from gateway.config.references import References
from gateway.config.settings import Alias, BackendSettings, ImageSettings, LimitOverrides, ParamsSettings, Tier

# Parameters that routing and the form of the answer depend on: a tier cannot change them.
OWN_PARAMS = frozenset({"model", "messages", "stream", "stream_options"})
_OWN_PARAM = "a tier cannot change '{}'; expected another parameter"


class TierResolver:
    """Converter of tiers from the document to the settings.

    `active` is the backend of all tiers that are not pinned, empty if there is none.
    """

    def __init__(
        self, problems: Problems, references: References, backends: Mapping[str, BackendSettings], active: str
    ) -> None:
        self._problems = problems
        self._references = references
        self._backends = backends
        self._active = active

    def resolve(self, name: str, item: TierDocument) -> Tier:
        """Return the settings of a tier; report mistakes."""
        path: Path = ("tiers", name)
        models: dict[str, str] = {}
        for written, model in item.models.items():
            if backend := self._references.backend((*path, "models", written), written):
                models[backend] = model
        pin = self._references.backend((*path, "backend"), item.backend) if item.backend is not None else None
        if pin and pin not in models:
            self._problems.add(
                (*path, "models"), f"tier {name!r} is pinned to {pin!r} but has no model for it; expected models.{pin}"
            )
        elif not item.backend and self._active and self._active not in models:
            self._problems.add(
                (*path, "models"),
                f"tier {name!r} has no model for {self._active!r}, the backend of all tiers that are not pinned; "
                f"expected models.{self._active}",
            )
        overrides = self._overrides(path, item)
        self._check_params(path, item)
        return Tier(
            name=name,
            models=models,
            aliases=tuple(Alias(**alias.model_dump()) for alias in item.aliases),
            backend=pin,
            fallback=self._fallback(path, item, models, pin),
            warm=item.warm,
            max_tokens=item.max_tokens,
            reasoning_field=item.reasoning_field,
            params=ParamsSettings(**item.params.model_dump()),
            images=ImageSettings(max_pixels=item.images.max_pixels),
            limits=overrides,
        )

    def _overrides(self, path: Path, item: TierDocument) -> dict[str, LimitOverrides]:
        overrides: dict[str, LimitOverrides] = {}
        for written, given in item.limits.items():
            if backend := self._references.backend((*path, "limits", written), written):
                overrides[backend] = LimitOverrides(**given.model_dump())
                is_ollama = backend not in self._backends or self._backends[backend].kind == "ollama"
                if given.model_concurrency == "auto" and not is_ollama:
                    self._problems.add(
                        (*path, "limits", written, "model_concurrency"),
                        f"got 'auto' for kind {self._backends[backend].kind}; expected a whole number of at least 1",
                    )
        return overrides

    def _fallback(self, path: Path, item: TierDocument, models: Mapping[str, str], pin: str | None) -> bool | str:
        if isinstance(item.fallback, bool):
            return item.fallback
        here = (*path, "fallback")
        backend = self._references.backend(here, item.fallback)
        if backend is None:
            return False
        if backend not in models:
            self._problems.add(here, f"tier {path[1]!r} has no model for {backend!r}; {expected_one_of(models)}")
        elif backend == pin:
            self._problems.add(here, f"the tier is pinned to {backend!r}; expected another backend")
        return backend

    def _check_params(self, path: Path, item: TierDocument) -> None:
        params = item.params
        for index, name in enumerate(params.drop):
            here = (*path, "params", "drop", index)
            if name in OWN_PARAMS:
                self._problems.add(here, _OWN_PARAM.format(name))
            elif name in params.force:
                self._problems.add(here, f"{name!r} is also under force; expected it under one of the two")
        for part, given in (("default", params.default), ("force", params.force)):
            for name, value in given.items():
                mistake = _OWN_PARAM.format(name) if name in OWN_PARAMS else parameter_problem(name, value)
                if mistake:
                    self._problems.add((*path, "params", part, name), mistake)
