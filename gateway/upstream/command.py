"""Runs a command of the operator's, which stops or starts an engine.

The command comes from the settings alone, never from a request, and no shell runs it. Its output is
discarded, since it may contain secrets. It does not inherit the gateway's own secrets.
"""

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "HEADERS")
"""Parts of the names of environment variables that a command does not get."""
OWN_PREFIX = "GATEWAY_"


class CommandFailed(Exception):
    """The command did not succeed. `why` is the reason in plain words, without the command itself."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


async def run_command(words: Sequence[str], seconds: float) -> None:
    """Run a command and wait for its end, at most `seconds`. After that it is killed, with its children.

    Raises:
        CommandFailed: it could not be started, did not end in time, or ended with another status than 0.
    """
    starting = asyncio.ensure_future(_start(words))
    try:
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        with suppress(OSError, ValueError):
            await _kill(await starting)  # it may run already; the event loop would kill it without its children
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise CommandFailed(f"could not be started ({reason or 'invalid'})") from None
    try:
        async with asyncio.timeout(seconds):
            status = await process.wait()
    except TimeoutError:
        raise CommandFailed(f"did not end within {seconds:.0f} s") from None
    finally:
        await _kill(process)
    if status:
        raise CommandFailed(f"ended with status {status}" if status > 0 else f"was killed by signal {-status}")


async def _start(words: Sequence[str]) -> asyncio.subprocess.Process:
    nothing = asyncio.subprocess.DEVNULL
    return await asyncio.create_subprocess_exec(
        *words,
        stdin=nothing,
        stdout=nothing,
        stderr=nothing,
        env=environment(os.environ),
        start_new_session=True,  # so that its children can be killed with it
    )


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill a command with its children, unless it has ended."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a command gets: all but the gateway's own and those that look like secrets."""
    return {
        name: value
        for name, value in variables.items()
        if not name.upper().startswith(OWN_PREFIX) and not any(word in name.upper() for word in SECRET_WORDS)
    }
