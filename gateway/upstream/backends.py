"""The backends in force, and the model loader that each one may need."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from gateway.admission.hub_limits import HubLimits
from gateway.admission.model_state import ModelState
from gateway.admission.shared_limits import SharedLimits
from gateway.config import Settings, is_same_place
from gateway.telemetry.metrics import Metrics
from gateway.upstream.backend import Backend
from gateway.upstream.model_loader import ModelLoader
from gateway.upstream.restraints import OnEvent


class Backends:
    """Builds, changes and drops backends as the settings ask for.

    - `current` holds the backends in force by name. It is filled here and changed in place by `relay.destinations`.
    - `on_down` is called when the circuit breaker of a server has opened, or a model cannot be loaded there.
    - `on_learned` is called when a backend has learned a concurrency limit.
    - `on_evicted` is called when a server has evicted a model that may still have requests.
    - `on_event` is called when a server has died, is well again, or was ejected.
    - `shared` holds the limits that are shared with other replicas of the gateway, if they are.
    """

    def __init__(
        self,
        current: dict[str, Backend],
        settings: Settings,
        metrics: Metrics,
        gateway_id: bytes,
        *,
        on_down: Callable[[Backend], None],
        on_learned: Callable[[], None],
        on_evicted: Callable[[ModelState], None],
        on_event: OnEvent | None = None,
        shared: SharedLimits | HubLimits | None = None,
    ) -> None:
        self.current = current
        self._metrics = metrics
        self._gateway_id = gateway_id
        self._on_down = on_down
        self._on_learned = on_learned
        self._on_evicted = on_evicted
        self._on_event = on_event
        self._shared = shared
        self._loaders: dict[Backend, ModelLoader] = {}
        current.update(self.built_for(settings))

    def __repr__(self) -> str:
        return f"<Backends {list(self.current.values())}>"

    def built_for(self, settings: Settings) -> dict[str, Backend]:
        """Return the backends of `settings` by name: those in force whose servers are the same, and new ones.

        Where one cannot be built (a `ca_file` that is not a certificate), none of the new ones is left.
        """
        found: dict[str, Backend] = {}
        with ExitStack() as undo:
            for name in settings.backends:
                backend = self._same_place(settings, name)
                if backend is None:
                    backend = self._build(settings, name)
                    undo.callback(self.drop, backend)
                found[name] = backend
            undo.pop_all()
        return found

    def change(self, settings: Settings, backends: Mapping[str, Backend]) -> None:
        """Apply `settings` to those of `backends` that are in force already, and to all model loaders."""
        for name, backend in backends.items():
            if self.current.get(name) is backend:
                backend.change(settings.backends[name], settings.ollama_num_parallel)
            if (loader := self._loaders.get(backend)) is not None:
                loader.change(settings)

    def drop(self, backend: Backend) -> None:
        """Close `backend` and cancel its model loads."""
        if (loader := self._loaders.pop(backend, None)) is not None:
            loader.stop()
        backend.close()

    def loader(self, backend: Backend) -> ModelLoader | None:
        """Return what loads the models of `backend`, None if its servers always have them loaded."""
        return self._loaders.get(backend)

    async def close(self) -> None:
        for loader in list(self._loaders.values()):  # a backend may be dropped meanwhile
            await loader.close()

    def _same_place(self, settings: Settings, name: str) -> Backend | None:
        backend = self.current.get(name)
        if backend is None or not is_same_place(backend.settings, settings.backends[name]):
            return None
        return backend

    def _build(self, settings: Settings, name: str) -> Backend:
        backend = Backend(
            settings.backends[name],
            settings.ollama_num_parallel,
            on_down=self._on_down,
            on_learned=self._on_learned,
            on_evicted=self._on_evicted,
            on_event=self._on_event,
            shared=self._shared,
        )
        if backend.loading is not None:
            self._loaders[backend] = ModelLoader(backend, settings, self._metrics, self._gateway_id)
        return backend
