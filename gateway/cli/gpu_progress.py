"""Progress of a switch of the engines on one GPU, for `gateway switch`, `rollback` and `undo`."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from gateway.cli.ops_client import OpsClient
from gateway.cli.tables import OUTCOMES, switch_line

POLL_SECONDS = 0.5


def follow_switch(
    client: OpsClient,
    gpu: Mapping[str, Any],
    pause: Callable[[float], None] = time.sleep,
    write: Callable[[str], None] = print,
) -> bool:
    """Write each phase of the switch in `gpu` until it has ended. Return whether the engine has the GPU.

    Ending this command does not end the switch.

    Raises:
        OpsError: the gateway no longer answers.
    """
    if gpu["to"] is None:
        return True
    target, phase = gpu["to"], ""
    while gpu["to"] == target:
        if gpu["phase"] != phase:
            phase = gpu["phase"]
            write(switch_line(gpu))
        if phase == "failed":
            break
        pause(POLL_SECONDS)
        found = client.request("GET", "/ops/rollout")["gpu"]
        if found is None:
            return False
        gpu = found
    last = gpu["last"] or {}
    if gpu["holder"] == target:
        write(f"{target} has the GPU")
        return True
    why = f": {last['why']}" if last.get("why") else ""
    write(f"the switch to {target} {OUTCOMES.get(last.get('outcome', ''), 'has not ended')}{why}")
    return False
