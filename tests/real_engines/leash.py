"""Run a command that cannot outlive who asked for it: `python leash.py COMMAND …`, with standard input a pipe that the owner holds open.

The pipe closes when the owner asks for the end, and also when the owner is killed. Then the command gets SIGTERM, some seconds, and
SIGKILL; whatever the command itself had started goes with it.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

GRACE_SECONDS = 15.0


def main(command: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the owner, who then lets go of the pipe
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def end_when_let_go() -> None:
        while os.read(0, 1024):
            pass
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
            return
        process.kill()

    threading.Thread(target=end_when_let_go, daemon=True).start()
    status = process.wait()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(
            process.pid, signal.SIGKILL
        )  # the session's other members; its number is not given anew while one of them lives
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
