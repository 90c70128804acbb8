"""`gateway bench load` beside `vllm bench serve`, on the same real vLLM in the same run.

`make bench-parity` runs it. Both clients share one event loop and take turns within each of the requests in
flight (`vllm_request_pairs.py`): what delays one client delays the other. Each figure is compared within a
round, and the median of the rounds' ratios counts. The model has a shape for which a token takes some 50 ms:
with the tests' own model (`--tiny`) it takes 3 ms, and what a client does takes processor time from the server.

With `--in-turn` each client has the server to itself, A B A B; the speed of a server on two cores then changes by
tens of percent from one turn to the next. With `--stand-in` it has a known pace, 1 s to the first token and 10
tokens a second.

vLLM's client counts the chunk that names the role as the first piece, and the first token, which arrives
together with it, as the second: each of its lists of gaps begins with one of nearly 0. `gateway bench`
counts tokens only. The gaps are therefore compared without that first one; the figure as vLLM reports it is
shown too.

Exit status 1: a figure differs by more than 3 %.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import orjson
import uvloop

from benchmarks.chaos_engines import MODEL, RealVllm
from benchmarks.report import mark
from benchmarks.scenarios import stand_in
from gateway.bench.measure import measure
from gateway.bench.options import BenchOptions
from gateway.bench.prompts import built_in, read_dataset
from gateway.bench.result_json import to_json
from gateway.bench.target import Target
from gateway.bench.writers import Style
from tests.real_engines.vllm import tiny_models

TOLERANCE = 0.03
LARGER_MODEL = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12}
"""Shape in which a token takes as long as on the servers that people measure (some 50 ms here), and a
client's work is nothing beside it. The tiny model takes 3 ms, and both clients slow it down."""
_ROOT = Path(__file__).parents[1]
_PAIRS = Path(__file__).with_name("vllm_request_pairs.py")
_CLIENT = Path(__file__).with_name("vllm_serve_client.py")


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that both report; `is_judged` is false for one that is shown for comparison only."""

    name: str
    unit: str
    is_judged: bool = True


FIGURES = (
    Figure("mean_ttft_ms", "ms"),
    Figure("median_ttft_ms", "ms"),
    Figure("mean_itl_ms without the role", "ms"),
    Figure("mean_itl_ms", "ms", is_judged=False),
    Figure("mean_tpot_ms", "ms"),
    Figure("median_e2el_ms", "ms"),
    Figure("output_throughput", "tok/s"),
    Figure("request_throughput", "req/s"),
)


@dataclass(frozen=True, slots=True)
class Load:
    """Workload that both clients send."""

    prompts: int
    at_once: int
    tokens: int


def write_dataset(path: Path, load: Load) -> None:
    """Write the prompts, each with the length of its answer."""
    rows = [
        {"prompt": built_in(number, ("ko", "en"))[1], "output_tokens": load.tokens} for number in range(load.prompts)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def figures_of(result: Mapping[str, Any], *, has_role_gap: bool) -> dict[str, float]:
    """Return the values of `FIGURES` in a result with details."""
    gaps = [gap for gaps in result["itls"] for gap in (gaps[1:] if has_role_gap else gaps)]
    found = {figure.name: result.get(figure.name) for figure in FIGURES}
    return {**found, "mean_itl_ms without the role": mean(gaps) * 1000}


def ours(url: str, dataset: Path, load: Load) -> dict[str, float]:
    """Measure with the scenario `load` of `gateway bench`."""
    options = BenchOptions(
        Target(url, MODEL),
        num_prompts=load.prompts,
        max_concurrency=load.at_once,
        dataset=tuple(read_dataset(dataset)),
        parameters={"temperature": 0, "ignore_eos": True},
    )
    result = uvloop.run(measure("load", options, None, Style()))
    return figures_of(to_json(result), has_role_gap=False)


def paired(url: str, dataset: Path, load: Load, venv: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Measure with both clients in one event loop; the throughput is that of one request at a time.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    packages = Path(orjson.__file__).parents[1]
    workers = str(load.at_once)
    command: list[str | Path] = [venv / "bin" / "python", "-P", _PAIRS, packages, url, MODEL, dataset, workers]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return pair_figures(found["ours"], has_role_gap=False), pair_figures(found["theirs"], has_role_gap=True)


def pair_figures(requests: Sequence[Sequence[Any]], *, has_role_gap: bool) -> dict[str, float]:
    """Return the values of `FIGURES` for requests of `vllm_request_pairs`."""
    ttfts, latencies, gaps, tokens = zip(*requests, strict=True)
    tpots = [(latency - ttft) / (count - 1) for ttft, latency, count in zip(ttfts, latencies, tokens, strict=True)]
    result = {
        "mean_ttft_ms": mean(ttfts) * 1000,
        "median_ttft_ms": median(ttfts) * 1000,
        "mean_itl_ms": mean([gap for each in gaps for gap in each]) * 1000,
        "mean_tpot_ms": mean(tpots) * 1000,
        "median_e2el_ms": median(latencies) * 1000,
        "output_throughput": sum(tokens) / sum(latencies),
        "request_throughput": len(latencies) / sum(latencies),
        "itls": gaps,
    }
    return figures_of(result, has_role_gap=has_role_gap)


class VllmClient:
    """A process that runs `vllm bench serve` whenever it is asked to."""

    def __init__(self, venv: Path, log: Path) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self._log = log
        self._tokenizer = tiny_models(venv) / "tiny-qwen3"
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [venv / "bin" / "python", "-P", _CLIENT],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, env=environment, text=True, cwd=log.parent,
            )  # fmt: skip
        self._expect("ready")

    def measure(self, url: str, dataset: Path, load: Load) -> dict[str, float]:
        """Measure with `vllm bench serve`.

        Raises:
            RuntimeError: it failed; the message has the end of its log.
        """
        assert self._process.stdin is not None
        result = self._log.with_name("result.json")
        arguments = [
            "--backend", "openai-chat", "--base-url", url, "--endpoint", "/v1/chat/completions", "--model", MODEL,
            "--tokenizer", str(self._tokenizer), "--dataset-name", "custom", "--dataset-path", str(dataset),
            "--skip-chat-template", "--disable-shuffle", "--custom-output-len", "-1",
            "--num-prompts", str(load.prompts), "--max-concurrency", str(load.at_once),
            "--temperature", "0", "--ignore-eos", "--disable-tqdm", "--percentile-metrics", "ttft,tpot,itl,e2el",
            "--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name,
        ]  # fmt: skip
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        self._expect("done")
        return figures_of(json.loads(result.read_text()), has_role_gap=True)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != word:
            self.close()
            raise RuntimeError(f"vllm bench serve failed: {self._log.read_text(errors='replace')[-2000:]}")


def table(rounds: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> tuple[str, bool]:
    """Return the table of all figures, and whether every judged one is within the tolerance."""
    lines = ["| figure | gateway bench | vllm bench serve | ratio | rounds | |", "|---|---:|---:|---:|---|---|"]
    all_within = True
    for figure in FIGURES:
        ratios = [mine[figure.name] / other[figure.name] for mine, other in rounds]
        ratio = median(ratios)
        is_within = abs(ratio - 1) <= TOLERANCE
        all_within &= is_within or not figure.is_judged
        values = [median(side[figure.name] for side in sides) for sides in zip(*rounds, strict=True)]
        verdict = mark(is_within) if figure.is_judged else "explained above"
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        cells = (
            f"{figure.name} ({figure.unit})",
            *(f"{value:.2f}" for value in values),
            f"{ratio:.3f}",
            spread,
            verdict,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines), all_within


@contextlib.contextmanager
def server(given: argparse.Namespace, venv: Path, folder: Path) -> Iterator[str]:
    """Yield the address of the server that both measure."""
    if given.url:
        yield given.url
    elif given.stand_in:
        pace = {"time_to_first_token": 1.0, "tokens_per_second": 10}
        with stand_in(folder, 1.0, "vllm", [MODEL], **pace) as url:
            yield url
    else:
        larger = ["--load-format", "dummy", "--hf-overrides", json.dumps(LARGER_MODEL)]
        with closing(RealVllm(venv, folder / "vllm.log", () if given.tiny else larger)) as engine:
            engine.start()
            engine.wait_until_ready()
            yield engine.url


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-concurrency", type=int, default=8)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--in-turn", action="store_true", help="one client at a time, in processes of their own")
    parser.add_argument("--stand-in", action="store_true", help="a server of known pace instead of a real vLLM")
    parser.add_argument("--tiny", action="store_true", help="the tests' model, for which a client's work counts")
    parser.add_argument("--url", default="", help="a vLLM that runs already, with the same tiny model")
    given = parser.parse_args()
    venv = Path(os.environ.get("TEST_VLLM_VENV", ".venv-vllm")).absolute()
    load = Load(given.num_prompts, given.max_concurrency, given.output_len)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = folder / "prompts.jsonl"
        write_dataset(dataset, load)
        with server(given, venv, folder) as url, contextlib.ExitStack() as stack:
            client = stack.enter_context(closing(VllmClient(venv, folder / "client.log"))) if given.in_turn else None
            ours(url, dataset, load)  # kernels compile
            rounds = []
            for number in range(given.rounds):
                rounds.append(
                    paired(url, dataset, load, venv)
                    if client is None
                    else (ours(url, dataset, load), client.measure(url, dataset, load))
                )
                print(f"round {number + 1} of {given.rounds}", file=sys.stderr)
    text, all_within = table(rounds)
    sent = f"{load.prompts} requests, {load.at_once} at once, {load.tokens} tokens each"
    order = "in turn" if given.in_turn else "in pairs"
    print(f"{sent}; {order}; medians of {given.rounds} rounds\n\n{text}")
    return 0 if all_within else 1


if __name__ == "__main__":
    sys.exit(main())
