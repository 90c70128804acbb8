"""The `gateway` command, and `python -m gateway`. Sees to the signals first: importing the rest takes a second."""

import signal
import sys
from types import FrameType


def main() -> None:
    """Entry point of the command."""
    if sys.argv[1:2] == ["serve"]:
        signal.signal(
            signal.SIGHUP, signal.SIG_IGN
        )  # until settings can be reread; by itself it would kill the process
        signal.signal(
            signal.SIGTERM, _leave
        )  # until the server listens to it; the first process of a container would not even be killed
    from gateway.cli import commands as cli

    cli.main()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main()
