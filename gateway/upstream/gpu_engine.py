"""Frees the GPU of one backend's engine, and wakes the engine again.

How depends on the backend:

1. With the commands `stop` and `start` in its settings, these are run.
2. An Ollama unloads each loaded model (`keep_alive: 0`), until `/api/ps` lists none. It loads models
   again when requests need them.
3. A vLLM sleeps (`POST /sleep?level=1&mode=wait`) and wakes (`POST /wake_up`). The endpoints exist with
   `VLLM_SERVER_DEV_MODE=1`, and free memory only with `--enable-sleep-mode`. Without the latter,
   vLLM 0.32 says that it sleeps and keeps its memory, which `/server_info` reveals
   (vllm/entrypoints/serve/dev, 0.32).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from gateway.engines.engine import MAX_REFUSAL
from gateway.engines.ollama_loading import loaded
from gateway.upstream.backend import Backend
from gateway.upstream.command import CommandFailed, run_command
from gateway.upstream.model_loader import ModelLoader
from gateway.upstream.server import VIA, Server
from gateway.upstream.transport_error import TransportError

FREE_SECONDS = 120.0
"""Longest time for an engine to free the GPU. A vLLM copies its weights to main memory."""
ASK_SECONDS = 5.0
"""Timeout of a question about an engine's state."""
INFO_SECONDS = 60.0
"""Timeout of `/server_info`: when it is asked for the first time, vLLM examines the machine for 5 to 15 s."""
POLL_SECONDS = 0.25
HANGS = -1
"""Status of a question that a server accepted and did not answer."""
MAX_INFO = 4 * 1024 * 1024
MAX_LISTED = 3
"""Models that a message lists."""

NO_SLEEP = (
    "it has no /sleep; start it with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode, or set the commands stop and start"
)
NO_MEMORY_FREED = (
    "it was started without --enable-sleep-mode, so that /sleep frees no memory; start it with that option, "
    "or set the commands stop and start"
)

_log = logging.getLogger(__name__)
_decoder = msgspec.json.Decoder()


class EngineStuck(Exception):
    """The engine did not free the GPU, or did not come up. `why` is the reason in plain words."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class GpuEngine:
    """The engine of one backend.

    `check` probes its servers and returns why none is up. `loader` loads the models of an Ollama.
    """

    def __init__(
        self,
        backend: Backend,
        loader: ModelLoader | None,
        check: Callable[[Backend], Awaitable[str]],
        gateway_id: bytes,
    ) -> None:
        self.backend = backend
        self._loader = loader
        self._check = check
        self._gateway_id = gateway_id

    def __repr__(self) -> str:
        return f"<GpuEngine {self.backend.name} {self.backend.turn}>"

    # State

    async def holds_gpu(self) -> bool:
        """Return whether the engine has, or may have, memory of the GPU. One that does not answer has none."""
        found = await asyncio.gather(*(self._server_holds_gpu(server) for server in self.backend.servers))
        return any(found)

    async def _server_holds_gpu(self, server: Server) -> bool:
        if self.backend.kind == "ollama":
            return bool(await self._loaded(server))
        if self.backend.kind == "vllm" and (is_asleep := await self._is_asleep(server)) is not None:
            return not is_asleep
        path = self.backend.engine.health_path or self.backend.engine.models_path
        return (await self._ask(server, "GET", path))[0] > 0

    async def obstacle(self) -> str:
        """Return why the engine could not free the GPU if it were told to, as far as is known; else an empty string."""
        if self.backend.settings.stop is not None or self.backend.kind != "vllm":
            return ""
        found = await asyncio.gather(*(self._obstacle_at(server) for server in self.backend.servers))
        return next((why for why in found if why), "")

    async def _obstacle_at(self, server: Server) -> str:
        status, _ = await self._ask(server, "GET", "/is_sleeping")
        if status <= 0:
            return ""  # it may be stopped
        if status != 200:
            return NO_SLEEP
        status, body = await self._ask(server, "GET", "/server_info?config_format=json", seconds=INFO_SECONDS)
        return NO_MEMORY_FREED if status == 200 and sleep_mode(body) is False else ""

    async def answers(self) -> bool:
        """Return whether a server of the backend answers."""
        found = await asyncio.gather(*(self._answers(server) for server in self.backend.servers))
        return any(found)

    # Free

    async def free(self) -> None:
        """Make the engine free the GPU. Its requests have to be over.

        Raises:
            EngineStuck: it may still have memory of the GPU.
        """
        if self._loader is not None:
            await self._loader.abort_loads()
        stop = self.backend.settings.stop
        if stop is not None:
            await self._run("stop", stop, FREE_SECONDS)
        elif self.backend.kind != "openai":
            free = self._unload if self.backend.kind == "ollama" else self._sleep
            try:
                async with asyncio.timeout(FREE_SECONDS):
                    await asyncio.gather(*(free(server) for server in self.backend.servers))
            except TimeoutError:
                raise EngineStuck(await self._why_not_free()) from None
        if self._loader is not None:
            for server in self.backend.servers:
                self._loader.is_empty(server)

    async def _why_not_free(self) -> str:
        reason = f"it did not free the GPU within {FREE_SECONDS:.0f} s"
        if self.backend.kind != "ollama":
            return reason
        names = [name for server in self.backend.servers for name in await self._loaded(server) or ()]
        listed = ", ".join(name if name.isprintable() else ascii(name) for name in names[:MAX_LISTED])
        return f"{reason}; it has loaded {listed}, which another program may use" if names else reason

    async def _unload(self, server: Server) -> None:
        loading = self.backend.loading
        assert loading is not None
        while True:
            status, names = await self._ask_loaded(server)
            if names == [] or (status == 0 and await self._is_gone(server)):
                return
            if names is None and status > 0:
                raise EngineStuck("it does not report which models are loaded")
            for name in names or ():
                await self._ask(server, "POST", loading.unload_path, loading.unload_body(name))
            await asyncio.sleep(POLL_SECONDS)

    async def _sleep(self, server: Server) -> None:
        status, _ = await self._ask(server, "POST", "/sleep?level=1&mode=wait", seconds=FREE_SECONDS)
        if status == 0 and await self._is_gone(server):
            return
        if status in (404, 405):
            raise EngineStuck(NO_SLEEP)
        if status != 200:
            raise EngineStuck(f"/sleep was answered with status {status}" if status > 0 else "/sleep was not answered")
        if not await self._is_asleep(server):
            raise EngineStuck("it does not sleep, although it was told to")

    # Wake

    async def start(self, seconds: float) -> None:
        """Run the command that starts the engine, if there is one.

        Raises:
            EngineStuck: the command failed, or did not end within `seconds`.
        """
        if self.backend.settings.start is not None:
            await self._run("start", self.backend.settings.start, seconds)

    async def wake(self, models: Sequence[str], seconds: float, *, loads: bool) -> None:
        """Wait until the engine answers, and wake it if it sleeps.

        With `loads`, it has to have some of `models`, and an Ollama loads the first of them.

        Raises:
            EngineStuck: it did not come up within `seconds`, or cannot.
        """
        why = ""
        try:
            async with asyncio.timeout(seconds):
                while why := await self._check(self.backend) or await self._wake_servers():  # noqa: ASYNC110
                    await asyncio.sleep(POLL_SECONDS)
                served = [name for name in models if any(server.serves(name) for server in self.backend.servers)]
                if loads and models and not served:
                    raise EngineStuck("it has none of the models that the tiers need")
                if loads and served and self._loader is not None:
                    await self._load(self._loader, served[0])
        except TimeoutError:
            raise EngineStuck(f"wake_timeout has passed ({why or 'it was still busy with that'})") from None

    async def _wake_servers(self) -> str:
        """Wake the servers of a vLLM that sleep. Return why none is awake; empty if one is."""
        if self.backend.kind != "vllm":
            return ""
        awake = await asyncio.gather(*(self._wake_up(server) for server in self.backend.servers))
        return "" if any(awake) else "no answer"

    async def _wake_up(self, server: Server) -> bool:
        """Wake a server if it sleeps. Return whether it is awake; one that has no sleep mode always is."""
        status, body = await self._ask(server, "GET", "/is_sleeping")
        if status != 200 or _decoded(body).get("is_sleeping") is not True:
            return status > 0
        status, _ = await self._ask(server, "POST", "/wake_up", seconds=None)
        if status != 200:
            raise EngineStuck(f"/wake_up was answered with status {status}" if status else "it ended while it woke up")
        if await self._is_asleep(server):
            raise EngineStuck("it still sleeps after /wake_up")
        return True

    async def _load(self, loader: ModelLoader, model: str) -> None:
        servers = [server for server in self.backend.servers if server.serves(model)]
        failures = await asyncio.gather(*(loader.load(server, model) for server in servers))
        if all(failures) and failures[0] is not None:
            raise EngineStuck(f"it could not load a model ({failures[0].code or failures[0].status})")

    # Questions

    async def _run(self, name: str, words: Sequence[str], seconds: float) -> None:
        _log.info("backend %s: running its %s command", self.backend.name, name)
        try:
            await run_command(words, seconds)
        except CommandFailed as failure:
            raise EngineStuck(f"its {name} command {failure.why}") from None

    async def _answers(self, server: Server) -> bool:
        return (await self._ask(server, "GET", self.backend.engine.models_path))[0] > 0

    async def _is_gone(self, server: Server) -> bool:
        """Return whether the engine does not run. One that hangs may still have memory of the GPU."""
        return (await self._ask(server, "GET", self.backend.engine.models_path))[0] == 0

    async def _is_asleep(self, server: Server) -> bool | None:
        """Return whether a vLLM sleeps, or None if it does not say."""
        status, body = await self._ask(server, "GET", "/is_sleeping")
        found = _decoded(body).get("is_sleeping") if status == 200 else None
        return found if isinstance(found, bool) else None

    async def _loaded(self, server: Server) -> list[str] | None:
        """Return the models that an Ollama has loaded, or None if it does not say."""
        return (await self._ask_loaded(server))[1]

    async def _ask_loaded(self, server: Server) -> tuple[int, list[str] | None]:
        """Return the status of an Ollama's answer as well."""
        assert self.backend.loading is not None
        status, body = await self._ask(server, "GET", self.backend.loading.path)
        found = loaded(body) if status == 200 else None
        return status, None if found is None else list(found)

    async def _ask(
        self, server: Server, method: str, path: str, body: bytes = b"", seconds: float | None = ASK_SECONDS
    ) -> tuple[int, bytes]:
        """Return the status and the body of an answer.

        The status is `HANGS` if there was none in time, and 0 if the connection failed.
        """
        headers = [*self.backend.headers(), (VIA.decode(), self._gateway_id.decode())]
        if body:
            headers.append(("Content-Type", "application/json"))
        limit = MAX_INFO if path.startswith("/server_info") else MAX_REFUSAL
        try:
            async with asyncio.timeout(seconds):
                with await server.pool.request(server.pool.head(method, path, headers), body) as response:
                    return response.status, await response.read(limit)
        except TimeoutError:
            return HANGS, b""
        except TransportError:
            return 0, b""


def sleep_mode(server_info: bytes) -> bool | None:
    """Return whether a vLLM was started with `--enable-sleep-mode`, by its answer to `/server_info`; None: unknown."""
    config = _decoded(server_info).get("vllm_config")
    model = config.get("model_config") if isinstance(config, dict) else None
    found = model.get("enable_sleep_mode") if isinstance(model, dict) else None
    return found if isinstance(found, bool) else None


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        found = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
