"""Crash safety of the state file: a killed writer leaves a complete file, and nothing is lost."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from gateway.state_file import StateFile

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("TEST_KILLS", "8"))
WRITER = """
import asyncio, os, sys
from pathlib import Path
from gateway.state_file import StateFile

async def main():
    state = StateFile(Path(sys.argv[1]))
    number = (state.get("rollout") or {"number": 0})["number"]
    while True:
        number += 1
        state.put("rollout", {"number": number, "history": ["x" * 100] * 100})
        assert await state.persisted()
        os.write(1, b"%d\\n" % number)

asyncio.run(main())
"""


def test_kill_during_a_write_loses_no_acknowledged_value(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for _ in range(KILLS):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            time.sleep(random.random() * 0.03)
            process.kill()
            acknowledged = (first + process.stdout.read()).splitlines()
        kept = StateFile(path).get("rollout")
        assert kept["number"] >= int(acknowledged[-1])
        assert len(kept["history"]) == 100
