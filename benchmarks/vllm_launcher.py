"""Starts real vLLM servers from one process that has imported vLLM: `python vllm_launcher.py …`.

It runs in vLLM's own virtual environment, and the arguments are those of vLLM's API server. On
a busy machine a vLLM takes three minutes to start, nearly all of which are imports: in the API
server, in the engine core and in the worker, which vLLM spawns on a CPU. Here they are forked and
share the imports, and a server is ready within seconds. Everything else is vLLM's own.

One command per line on standard input: `start` answers with the process id of the API server,
`poll` with `running` or, after its end, with its exit status (minus the signal). What is left of
its process group is then killed. At the end of standard input the server is killed, too, so that
it cannot outlive its owner.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

_PRELOADED = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3",
)


def main(arguments: list[str]) -> None:
    """Import vLLM, and serve the commands on standard input until it ends."""
    serve = importlib.import_module(_PRELOADED[0]).main
    for name in _PRELOADED[1:]:
        importlib.import_module(name)
    forked = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forked  # type: ignore[assignment]
    serve_commands(serve, arguments)


def serve_commands(serve: Callable[[], None], arguments: list[str]) -> None:
    """Start `serve` in processes of their own, with these arguments, as standard input commands."""
    _say("ready")
    server = Server(serve, arguments)
    for command in sys.stdin:
        _say(str(server.start()) if command == "start\n" else server.poll())
    server.kill()


class Server:
    """The server that runs at the moment, if any."""

    def __init__(self, serve: Callable[[], None], arguments: list[str]) -> None:
        self._serve = serve
        self._arguments = arguments
        self._pid = 0
        self._status = "not started"

    def start(self) -> int:
        self._pid = os.fork()
        if not self._pid:
            _become_server(self._serve, self._arguments)
        self._status = "running"
        return self._pid

    def poll(self) -> str:
        if self._status == "running":
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            if ended:
                self._status = str(os.waitstatus_to_exitcode(status))
                self.kill()
        return self._status

    def kill(self) -> None:
        """Kill the server, if it runs, and its group, whose number is not reused while a member lives."""
        if self._status == "running":  # it may have no group of its own yet
            os.kill(self._pid, signal.SIGKILL)
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)


def _become_server(serve: Callable[[], None], arguments: list[str]) -> NoReturn:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.argv[1:] = arguments
    status = 1
    try:
        serve()
        status = 0
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 1
    finally:
        os._exit(status)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
