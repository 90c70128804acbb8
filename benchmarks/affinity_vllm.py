"""Affinity on two real vLLMs: how much of the prompts their prefix caches held, by router and policy.

`make bench-affinity-vllm` runs it. Two vLLMs with prefix caches (a small model of random weights, on
the CPU) get the same requests through this gateway, vllm-router and SMG, policy after policy, from empty
caches each time. The hits are the servers' own counters, `vllm:prefix_cache_hits_total` and
`vllm:prefix_cache_queries_total`, in tokens. `affinity.py` has the same on a model of the servers,
with more servers, more policies and more traffic.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from benchmarks.affinity_traffic import WORKLOADS, Chain
from benchmarks.chaos_engines import MODEL, RealVllm
from benchmarks.processes import started
from gateway.bench.http_client import HttpLoadClient
from gateway.bench.quantiles import supported_quantile
from gateway.bench.results import RequestRecord
from gateway.bench.target import BenchRequest, Target
from tests.real_engines.process import Server, free_port

ANSWER_TOKENS = 12
TIMEOUT = 300.0
COUNTERS = {
    "queries": "vllm:prefix_cache_queries_total",
    "hits": "vllm:prefix_cache_hits_total",
    "requests": "vllm:request_success_total",
}
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}
"""A model larger than the tests' own, so that a prompt that is not cached takes a noticeable time."""


class CachingVllm:
    """A vLLM with a prefix cache of `blocks` blocks of 32 tokens, which can be emptied."""

    def __init__(self, venv: Path, log: Path, blocks: int) -> None:
        options = ["--enable-prefix-caching", "--block-size", "32", "--num-gpu-blocks-override", str(blocks)]
        options += ["--load-format", "dummy", "--hf-overrides", json.dumps(SHAPE), "--max-model-len", "8192"]
        self.engine = RealVllm(venv, log, [*options, "--max-num-seqs", "16"], VLLM_SERVER_DEV_MODE="1")
        self.url = self.engine.url

    def counters(self) -> dict[str, float]:
        """Return the values of `COUNTERS`."""
        answer = httpx2.get(f"{self.url}/metrics", trust_env=False, timeout=60.0).raise_for_status()
        return counters_of(answer.text)

    def reset_cache(self) -> None:
        """Empty the prefix cache, as soon as no request holds a part of it.

        Raises:
            RuntimeError: the server refused for half a minute.
        """
        deadline = time.monotonic() + 30
        while True:
            answer = httpx2.post(f"{self.url}/reset_prefix_cache", trust_env=False, timeout=60.0).raise_for_status()
            if answer.json()["success"]:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.url} did not reset its prefix cache")
            time.sleep(0.5)


def counters_of(metrics: str) -> dict[str, float]:
    """Return the sums of `COUNTERS` over the series of an exposition."""
    sums = dict.fromkeys(COUNTERS.values(), 0.0)
    for name, value in re.findall(r"^(vllm:\w+)(?:\{[^}]*\})? (\S+)$", metrics, re.MULTILINE):
        if name in sums:
            sums[name] += float(value)
    return {short: sums[name] for short, name in COUNTERS.items()}


@dataclass
class Tally:
    """Outcome of one policy with one workload, over all rounds."""

    hits: float = 0.0
    queries: float = 0.0
    requests: list[int] = field(default_factory=list)
    records: list[RequestRecord] = field(default_factory=list)

    def add(self, before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]) -> None:
        """Add the differences of the servers' counters."""
        changes = [{key: b[key] - a[key] for key in COUNTERS} for a, b in zip(before, after, strict=True)]
        self.hits += sum(change["hits"] for change in changes)
        self.queries += sum(change["queries"] for change in changes)
        given = [round(change["requests"]) for change in changes]
        self.requests = [a + b for a, b in zip(self.requests or [0] * len(given), given, strict=True)]

    def row(self) -> tuple[str, ...]:
        """Return the cells of the table after the policy's name."""
        times = [record.ttft * 1000 for record in self.records if record.ttft is not None]
        p95 = supported_quantile(times, 95)
        return (
            f"{self.hits / self.queries:.3f}" if self.queries else "–",
            f"{self.queries - self.hits:,.0f}",
            f"{statistics.median(times):,.0f}" if times else "–",
            "n too small" if p95 is None else f"{p95:,.0f}",
            " : ".join(map(str, self.requests)),
            str(sum(bool(record.error) for record in self.records)),
        )


HEADINGS = ("policy", "cached", "tokens computed", "TTFT p50 (ms)", "TTFT p95 (ms)", "requests by server", "failed")


@contextlib.contextmanager
def gateway(balance: str, urls: Sequence[str], folder: Path) -> Iterator[str]:
    """Run this gateway in front of the servers and yield its address once it knows them."""
    backend = {"kind": "vllm", "servers": [{"base_url": url} for url in urls], "balance": balance}
    document = {
        "llm_backend": "vllm",
        "backends": {"vllm": backend},
        "tiers": {MODEL: {"models": {"vllm": MODEL}}},
        "state_file": "",
    }
    path = folder / "gateway.yaml"
    path.write_text(json.dumps(document))
    environment = {"GATEWAY_PORT": "0", "GATEWAY_LOG_LEVEL": "info", "GATEWAY_USAGE_FILE": ""}
    words = ["serve", "--config", str(path)]
    with started(words, folder / "gateway.log", r"(http://127\.0\.0\.1:\d+)", **environment) as server:
        deadline = time.monotonic() + 60
        while httpx2.get(f"{server.url}/readyz", trust_env=False, timeout=10.0).status_code != 200:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the gateway was not ready: {(folder / 'gateway.log').read_text()[-1000:]}")
            time.sleep(0.2)
        yield server.url


@contextlib.contextmanager
def vllm_router(policy: str, urls: Sequence[str], folder: Path) -> Iterator[str]:
    """Run vllm-router with a policy, and everything else as it comes; yield its address."""
    with _router(["vllm-router", "--log-level", "warning"], policy, urls, folder) as url:
        yield url


@contextlib.contextmanager
def smg(policy: str, urls: Sequence[str], folder: Path) -> Iterator[str]:
    """Run SMG with a policy; yield its address. It gets no tokenizer: random weights have none that it could load."""
    options = ["--backend", "vllm", "--disable-tokenizer-autoload", "--log-level", "warn"]
    with _router(["smg", "launch", *options], policy, urls, folder) as url:
        yield url


@contextlib.contextmanager
def _router(words: Sequence[str], policy: str, urls: Sequence[str], folder: Path) -> Iterator[str]:
    port = free_port()
    program = Path(os.environ.get("BENCH_VENV", ".venv-bench")).absolute() / "bin" / words[0]
    command: list[str | Path] = [program, *words[1:], "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", *urls, "--policy", policy, "--prometheus-port", str(free_port())]
    server = Server(
        command, port=port, health_path="/v1/models", log=folder / "router.log", environment=os.environ, cwd=folder
    )
    with server:
        yield server.url


Start = Callable[[Sequence[str], Path], contextlib.AbstractContextManager[str]]
POLICIES: dict[str, Start] = {
    "gateway, affinity": lambda urls, folder: gateway("affinity", urls, folder),
    "gateway, least_busy": lambda urls, folder: gateway("least_busy", urls, folder),
    "vllm-router, cache_aware (its default)": lambda urls, folder: vllm_router("cache_aware", urls, folder),
    "SMG, cache_aware (its default)": lambda urls, folder: smg("cache_aware", urls, folder),
    "vllm-router, round_robin": lambda urls, folder: vllm_router("round_robin", urls, folder),
}


async def play(url: str, chains: Sequence[Chain]) -> list[RequestRecord]:
    """Send all chains at the same time, the requests of each one after the other."""
    client = HttpLoadClient(Target(url, MODEL))

    async def follow(chain: Chain) -> list[RequestRecord]:
        records = []
        for step in chain:
            await asyncio.sleep(step.pause)
            parameters = {"temperature": 0, "ignore_eos": True}
            request = BenchRequest(step.messages, ANSWER_TOKENS, parameters=parameters, timeout=TIMEOUT)
            records.append(await client.send(request))
        return records

    try:
        return [record for records in await asyncio.gather(*map(follow, chains)) for record in records]
    finally:
        await client.close()


def measure(start: Start, servers: Sequence[CachingVllm], chains: Sequence[Chain], folder: Path, tally: Tally) -> None:
    """Play a workload through a freshly started router on empty caches, and add what came of it."""
    for server in servers:
        server.reset_cache()
    with start([server.url for server in servers], folder) as url:
        before = [server.counters() for server in servers]
        tally.records += asyncio.run(play(url, chains))
        tally.add(before, [server.counters() for server in servers])


@contextlib.contextmanager
def running(venv: Path, folder: Path, number: int, blocks: int) -> Iterator[list[CachingVllm]]:
    """Run the servers, started together."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(number) as pool:
        logs = [folder / f"vllm-{place}.log" for place in range(number)]
        servers = list(pool.map(lambda log: CachingVllm(venv, log, blocks), logs))
        for server in servers:
            stack.callback(server.engine.close)
            server.engine.start()
        for server in servers:
            server.engine.wait_until_ready()
        yield servers


def table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"\n### {title}\n", f"| {' | '.join(HEADINGS)} |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> int:
    """Measure every policy in turn, round by round, and print a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="each has other requests")
    parser.add_argument("--size", type=float, default=1.0, help="of the workloads")
    parser.add_argument("--blocks", type=int, default=750, help="blocks of 32 tokens in each prefix cache")
    parser.add_argument("--servers", type=int, default=2)
    given = parser.parse_args()
    venv = Path(os.environ.get("TEST_VLLM_VENV", ".venv-vllm")).absolute()
    tallies = {(workload, policy): Tally() for workload in WORKLOADS for policy in POLICIES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with running(venv, folder, given.servers, given.blocks) as servers:
            for server in servers:
                asyncio.run(play(server.url, WORKLOADS["growing conversations"](0, 0.05)))  # kernels compile
            for number in range(1, given.rounds + 1):
                for (workload, policy), tally in tallies.items():
                    began = time.monotonic()
                    measure(POLICIES[policy], servers, WORKLOADS[workload](number, given.size), folder, tally)
                    row = ", ".join(tally.row())
                    print(
                        f"round {number}: {workload}, {policy}: {time.monotonic() - began:.0f} s: {row}",
                        file=sys.stderr,
                    )
    for workload in WORKLOADS:
        print(table(workload, [(policy, *tallies[workload, policy].row()) for policy in POLICIES]))
    return int(any(record.error for tally in tallies.values() for record in tally.records))


if __name__ == "__main__":
    sys.exit(main())
