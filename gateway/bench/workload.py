"""The requests of a scenario, and the description by which two results are comparable."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gateway.bench.options import BenchOptions
from gateway.bench.prompts import TokenRatio, built_in, made_up_text, numbered, user
from gateway.bench.results import CellValue
from gateway.bench.runner import Runner, RunPlan
from gateway.bench.target import BenchRequest

DEFAULT_TIMEOUT = 600.0
PROBE_TEXT = "Hi"
PROBE_WORDS = (20, 220)
"""Words of the two prompts by which the tokens of a word are measured."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Source of a scenario's requests.

    Attributes:
        notes: what a reader has to know about their length, as keys of `gateway.bench.texts`.
    """

    options: BenchOptions
    output_len: int
    tokens_per_word: float = 1.0
    notes: tuple[str, ...] = ()

    @classmethod
    async def of(cls, options: BenchOptions, runner: Runner, output_len: int) -> "Prompts":
        """Prepare the source; with an input length, measure first how many tokens a word has there."""
        chosen = options.output_len or output_len
        if options.input_len is None or options.dataset:
            return cls(options, chosen)
        ratio = await token_ratio(options, runner)
        if ratio is None:
            return cls(options, chosen, notes=("length_estimated",))
        return cls(options, chosen, ratio.per_word)

    def take(self, count: int, first: int = 0) -> list[BenchRequest]:
        """Return `count` requests from number `first` on; the same numbers give the same requests."""
        return [self.request(number) for number in range(first, first + count)]

    def endless(self) -> Iterator[BenchRequest]:
        """Yield requests without end."""
        number = 0
        while True:
            yield self.request(number)
            number += 1

    def request(self, number: int) -> BenchRequest:
        """Return the request with this number."""
        options = self.options
        if options.dataset:
            row = options.dataset[number % len(options.dataset)]
            tokens = options.output_len or row.max_tokens or self.output_len
            return self.completed(replace(row, max_tokens=tokens))
        if options.input_len is not None:
            rng = random.Random(f"{options.seed}/{number}")
            text = numbered(number + 1, made_up_text(options.input_len, rng, self.tokens_per_word))
            return self.completed(BenchRequest(user(text), self.output_len))
        language, text = built_in(number, options.languages, options.seed)
        return self.completed(BenchRequest(user(text), self.output_len, language=language))

    def probe(self) -> BenchRequest | None:
        """Return the request that is sent beside a load, as vLLM has it: one word, answered by one token."""
        return self.completed(BenchRequest(user(PROBE_TEXT), 1)) if self.options.probe_rate is not None else None

    def completed(self, request: BenchRequest) -> BenchRequest:
        """Add what the options say about every request."""
        options = self.options
        return replace(
            request,
            parameters={**request.parameters, **options.parameters},
            timeout=DEFAULT_TIMEOUT if options.timeout is None else options.timeout,
            stream=options.stream,
        )


async def token_ratio(options: BenchOptions, runner: Runner) -> TokenRatio | None:
    """Measure how many tokens the server counts for a made-up word; None if it does not tell."""
    counts = []
    for words in PROBE_WORDS:
        text = made_up_text(words, random.Random(f"probe {options.seed} {words}"))
        probe = BenchRequest(user(text), 1, stream=False, timeout=DEFAULT_TIMEOUT)
        records = (await runner.run(RunPlan("warm-up", [probe]))).records
        if not records or not records[0].prompt_tokens:
            return None
        counts.append((words, records[0].prompt_tokens))
    try:
        return TokenRatio.of(counts[0], counts[1])
    except ValueError:
        return None


def digest(requests: Sequence[BenchRequest]) -> str:
    """Return a SHA-256 of all requests; the model and the stream's form are left out."""
    whole = hashlib.sha256()
    for request in requests:
        images = [hashlib.sha256(image.data).hexdigest() for image in request.images]
        fields = [list(request.messages), request.max_tokens, images, dict(request.parameters)]
        whole.update(json.dumps(fields, sort_keys=True, ensure_ascii=False).encode())
    return whole.hexdigest()


def describe(options: BenchOptions, requests: Sequence[BenchRequest], **more: CellValue) -> dict[str, CellValue]:
    """Return the workload of a result, as `ScenarioResult.workload` has it."""
    if options.ramp_up is not None:
        more |= options.ramp_up.to_json()
    if options.probe_rate is not None:
        more["probe_request_rate"] = options.probe_rate
    return {
        "requests": len(requests),
        "requests_sha256": digest(requests),
        "max_concurrency": options.max_concurrency,
        "request_rate": options.request_rate,
        "burstiness": options.burstiness,
        "seed": options.seed,
        "stream": "yes" if options.stream else "no",
        **more,
    }
