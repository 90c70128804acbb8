"""Runs `vllm bench serve` several times in one process: `python vllm_serve_client.py`.

It runs in vLLM's own virtual environment, whose imports take minutes on a busy machine. One JSON list of
arguments per line on standard input; each is answered with `done` or `failed`.
"""

import argparse
import contextlib
import importlib
import json
import sys
import traceback


def serve() -> None:
    """Import vLLM's client, say `ready`, and run it for each line of standard input."""
    module = importlib.import_module("vllm.benchmarks.serve")
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


if __name__ == "__main__":
    serve()
