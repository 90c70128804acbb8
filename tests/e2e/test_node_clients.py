"""Programs on npm's clients (ollama, the AI SDK and its providers) on every engine behind the gateway.

They run where `TEST_NODE_CLIENTS` names a folder in which `npm install ai @ai-sdk/openai
@ai-sdk/anthropic ollama ollama-ai-provider-v2 zod` was run.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.engines import Engine
from tests.e2e.gateway import KEY, Gateway

PROGRAMS = Path(__file__).with_name("programs") / "clients.mjs"
FOLDER = os.environ.get("TEST_NODE_CLIENTS")

pytestmark = [
    pytest.mark.skipif(not FOLDER, reason="TEST_NODE_CLIENTS is not set"),
    pytest.mark.timeout(300),
]


def test_every_program_works(tool_engine: Engine, tool_gateway: Gateway, tmp_path: Path) -> None:
    assert FOLDER is not None
    shutil.copy(PROGRAMS, tmp_path)
    (tmp_path / "node_modules").symlink_to(Path(FOLDER).resolve() / "node_modules")
    run = subprocess.run(
        ["node", "clients.mjs", f"{tool_gateway.url}/v1", KEY, "standard", str(int(tool_engine.is_real))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 22, run.stderr
    assert [program for program in found if not program["works"]] == []
