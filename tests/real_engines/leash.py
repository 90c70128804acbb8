"""Run a command that cannot outlive its owner: `python leash.py COMMAND …`.

Standard input is a pipe that the owner holds open. It closes when the owner wants the command to
end, and also when the owner is killed. The command then gets SIGTERM and, after `GRACE_SECONDS`,
SIGKILL. Processes that the command has started are killed with it.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

GRACE_SECONDS = 15.0


def main(command: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, which then closes the pipe
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def end_when_pipe_closes() -> None:
        while os.read(0, 1024):
            pass
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
            return
        process.kill()

    threading.Thread(target=end_when_pipe_closes, daemon=True).start()
    status = process.wait()
    with suppress(ProcessLookupError, PermissionError):
        # The other members of the session. Its number is not reused while one of them lives.
        os.killpg(process.pid, signal.SIGKILL)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
