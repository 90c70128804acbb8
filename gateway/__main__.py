"""The `gateway` command and `python -m gateway`.

For `serve`, signal handlers are installed before the rest is imported, which takes a second.
"""

import signal
import sys
from types import FrameType

INTERRUPTED = 130
"""Exit status after SIGINT, as shells report it."""


def main() -> None:
    """Run the command line.

    An interruption is not an error, also while the modules are still imported: commands that have something to
    report after Ctrl-C handle SIGINT themselves.
    """
    if sys.argv[1:2] == ["serve"]:
        # Until the settings can be reread: SIGHUP would kill the process by default.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # Until the server handles it: by default, SIGTERM would not even end PID 1 of a container.
        signal.signal(signal.SIGTERM, _exit)
    try:
        from gateway.cli import commands

        commands.main()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main()
