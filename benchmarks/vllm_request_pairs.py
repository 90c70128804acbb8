"""Pairs of equal requests to one vLLM, one by vLLM's load client, one by the gateway's, in turn.

`python vllm_request_pairs.py SITE_PACKAGES URL MODEL DATASET WORKERS` runs in vLLM's own virtual environment,
with the gateway's package on its path. SITE_PACKAGES has what the gateway needs and vLLM does not install;
vLLM's own packages take precedence. WORKERS pairs are under way at a time. Both clients run in one event loop,
so that a moment in which the machine does other work delays both. Which of a pair is sent first alternates, and
a request is sent at a random moment of an engine's step: right at its beginning, the client that sends a
millisecond sooner would get its first token a whole step sooner. It prints one JSON line: by client, a
list of `[ttft, latency, gaps, tokens]` of its requests in seconds; vLLM's gaps begin with the one between
the role and the first token.
"""

import asyncio
import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(sys.argv[1])

from gateway.bench.http_client import HttpLoadClient
from gateway.bench.target import BenchRequest, Target

MAX_PAUSE_SECONDS = 0.1
"""Some steps of the engine."""
Measured = list[Any]


class Pairs:
    """The two clients, and what they measured."""

    def __init__(self, url: str, model: str) -> None:
        self._theirs = importlib.import_module("vllm.benchmarks.lib.endpoint_request_func")
        self._http = importlib.import_module("aiohttp")
        self._url = f"{url}/v1/chat/completions"
        self._model = model
        self._ours = HttpLoadClient(Target(url, model))
        self._random = random.Random(0)
        self.found: dict[str, list[Measured]] = {"ours": [], "theirs": []}

    async def run(self, rows: list[dict[str, Any]], workers: int) -> None:
        """Send all pairs, `workers` at a time; the first one of each is a warm-up."""
        numbered = iter(enumerate(rows))
        async with self._http.ClientSession(connector=self._http.TCPConnector(limit=0)) as session:
            await self._pair(0, rows[0], session)
            self.found = {"ours": [], "theirs": []}
            await asyncio.gather(*(self._worker(numbered, session) for _ in range(workers)))
        await self._ours.close()

    async def _worker(self, numbered: Iterator[tuple[int, dict[str, Any]]], session: Any) -> None:
        for number, row in numbered:
            await self._pair(number, row, session)

    async def _pair(self, number: int, row: dict[str, Any], session: Any) -> None:
        both = [self._send_ours(row), self._send_theirs(row, session)]
        for sending in both if number % 2 else reversed(both):
            await asyncio.sleep(self._random.uniform(0, MAX_PAUSE_SECONDS))
            await sending

    async def _send_ours(self, row: dict[str, Any]) -> None:
        parameters = {"temperature": 0, "ignore_eos": True}
        messages = ({"role": "user", "content": row["prompt"]},)
        record = await self._ours.send(BenchRequest(messages, row["output_tokens"], parameters=parameters))
        if record.error:
            raise RuntimeError(record.error)
        self.found["ours"].append([record.ttft, record.latency, list(record.itl), record.completion_tokens])

    async def _send_theirs(self, row: dict[str, Any], session: Any) -> None:
        asked = self._theirs.RequestFuncInput(
            model=self._model, prompt=row["prompt"], api_url=self._url, prompt_len=1, output_len=row["output_tokens"],
            ignore_eos=True, extra_body={"temperature": 0},
        )  # fmt: skip
        output = await self._theirs.async_request_openai_chat_completions(asked, session)
        if not output.success:
            raise RuntimeError(output.error)
        self.found["theirs"].append([output.ttft, output.latency, output.itl, output.output_tokens])


def main(url: str, model: str, dataset: str, workers: str) -> None:
    """Run all pairs of a dataset and print what was measured."""
    rows = [json.loads(line) for line in Path(dataset).read_text("utf-8").splitlines()]
    pairs = Pairs(url, model)
    asyncio.run(pairs.run(rows, int(workers)))
    print(json.dumps(pairs.found))


if __name__ == "__main__":
    main(*sys.argv[2:])
