"""The systems that users have reported, as stand-ins, measured by `gateway bench` with and without the gateway.

`make bench-scenarios` runs it. Each table has what a user reported, what the scenario measures on a
stand-in with the same behaviour, and what it measures through the gateway. The stand-ins run faster than
the reports (`--time-scale`); all times are shown at the scale of the reports.

Exit status 1: a figure that the gateway should keep is missed.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import started
from benchmarks.report import mark
from gateway.bench.measure import measure
from gateway.bench.options import BenchOptions
from gateway.bench.results import ScenarioResult
from gateway.bench.target import Api, Target
from gateway.bench.writers import Style
from gateway.simulate import SEED_SLOWDOWN

TOKENS = 10
NO_LOSS = 0.98
IMAGES = 51.0
NOTHING = "–"


@dataclass
class Report:
    """The tables so far, and whether every target was met."""

    scale: float
    passed: bool = True

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table and print it."""
        text = [f"\n### {title}\n", f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
        text += [f"| {' | '.join(row)} |" for row in rows]
        print("\n".join(text), flush=True)

    def target(self, name: str, is_met: bool) -> None:
        """Print whether a target is met."""
        self.passed &= is_met
        print(f"\n{name}: {mark(is_met)}", flush=True)

    def seconds(self, value: Any) -> str:
        """Return measured seconds at the scale of the reports."""
        return f"{float(value) / self.scale:.1f} s" if value else NOTHING


def ratio(value: Any) -> str:
    """Return a speed-up as text."""
    return f"{float(value):.2f}x" if value else NOTHING


@contextlib.contextmanager
def stand_in(folder: Path, scale: float, kind: str, models: Sequence[str], **options: object) -> Iterator[str]:
    """Run a stand-in and yield its address."""
    words = ["simulate", "--kind", kind]
    for model in models:
        words += ["--model", model]
    for name, value in {"time_scale": scale, **options}.items():
        words += ["--set", f"{name}={value}"]
    with started(words, folder / f"{kind}.log", r"(http://\S+)") as server:
        yield server.url


@contextlib.contextmanager
def gateway(folder: Path, kind: str, url: str, models: Sequence[str], **backend: object) -> Iterator[str]:
    """Run a gateway with a tier for each model and yield its address."""
    document = {
        "llm_backend": kind,
        "backends": {kind: {"kind": kind, "base_url": url, "probe_interval": 60, **backend}},
        "tiers": {model: {"models": {kind: model}} for model in models},
        "state_file": "",
    }
    path = folder / "gateway.yaml"
    path.write_text(json.dumps(document))
    environment = {"GATEWAY_PORT": "0", "GATEWAY_LOG_LEVEL": "info", "GATEWAY_USAGE_FILE": ""}
    words = ["serve", "--config", str(path)]
    with started(words, folder / "gateway.log", r"(http://127\.0\.0\.1:\d+)", **environment) as server:
        yield server.url


def run(scenario: str, url: str, model: str, api: Api = "openai", **changes: Any) -> ScenarioResult:
    """Run a scenario."""
    defaults: dict[str, Any] = {"target": Target(url, model, api), "output_len": TOKENS}
    options = BenchOptions(**(defaults | changes))
    return asyncio.run(measure(scenario, options, None, Style()))


def figures_of(result: ScenarioResult) -> dict[str, Any]:
    """Return the scenario's figures; a missing one is 0."""
    return {name: value or 0 for name, value in result.figures.items()}


REPORTED_IMAGES = {
    1: ("51.0 s", "1.00x"),
    5: ("397.2 s", "0.64x"),
    10: ("> 600 s, failed", NOTHING),
    20: ("> 600 s, failed", NOTHING),
}


def images(folder: Path, report: Report) -> None:
    """Images on an Ollama: at once they hinder each other; the gateway's lane serves them in turn."""
    models = ["qwen3-vl:8b"]
    scale = report.scale
    options = {"image_seconds": 50.0, "tokens_per_second": TOKENS, "image_slowdown": SEED_SLOWDOWN}
    with stand_in(folder, scale, "ollama", ["qwen3-vl:8b,vision"], **options) as url:
        direct = figures_of(run("vision-batch", url, models[0], "ollama", timeout=600 * scale))
        with gateway(folder, "ollama", url, models) as through:
            ours = figures_of(run("vision-batch", through, models[0], timeout=1800 * scale))

    def shown(figures: Any, files: int) -> tuple[str, str]:
        failed = figures[f"failed_{files}"]
        time = report.seconds(figures[f"total_s_{files}"])
        return (f"{time}, {failed} failed" if failed else time), ratio(figures[f"speedup_{files}"])

    rows = [
        (str(files), *REPORTED_IMAGES[files], *shown(direct, files), f"{IMAGES * files:.0f} s", *shown(ours, files))
        for files in REPORTED_IMAGES
    ]
    headings = (
        "files", "reported", "speed-up", "stand-in", "speed-up", "one after the other (computed)",
        "through the gateway", "speed-up",
    )  # fmt: skip
    report.table("Images on an Ollama", headings, rows)
    report.target("naive images are slower at once (0.62 to 0.66 times)", 0.62 <= direct["speedup_5"] <= 0.66)
    report.target(f"images through the gateway lose nothing (≥ {NO_LOSS} times)", ours["speedup_5"] >= NO_LOSS)


def texts(folder: Path, report: Report) -> None:
    """Three texts in turn and at once; two models and three languages."""
    models = ["gemma2:2b", "llama3.1:8b"]
    options = {"parallel": 3, "time_to_first_token": 172.0, "tokens_per_second": 1}
    with stand_in(folder, report.scale, "ollama", models, **options) as url:
        direct = run("text-parallel", url, models[0], "ollama", output_len=11)
        several = run("multi-model", url, models[0], "ollama", models=tuple(models), output_len=11)
        with gateway(folder, "ollama", url, models, model_concurrency=3) as through:
            ours = run("text-parallel", through, models[0], output_len=11)
            ours_several = run("multi-model", through, models[0], models=tuple(models), output_len=11)
    for title, reported, sides in (
        ("Three texts on an Ollama", ("546 s", "182 s", "3.0x"), (direct, ours)),
        ("Two models, three languages on an Ollama", (NOTHING, NOTHING, "“no loss”"), (several, ours_several)),
    ):
        rows = [("reported", *reported)]
        for name, side in zip(("stand-in", "through the gateway"), sides, strict=True):
            figures = figures_of(side)
            speeds = (report.seconds(figures["in_turn_s"]), report.seconds(figures["together_s"]))
            rows.append((name, *speeds, ratio(figures["speedup"])))
        report.table(title, ("", "one after the other", "at once", "speed-up"), rows)
        report.target(f"{title}: 3.0 times", all(abs(figures_of(side)["speedup"] - 3) < 0.1 for side in sides))


def sixteen(folder: Path, report: Report) -> None:
    """16 requests at once on an Ollama and on a vLLM."""
    rows = [
        ("Ollama, reported", "0.69 s", "3.49 s", "3.52 s", "one after the other"),
        ("vLLM, reported", "4.08 s", "4.10 s", "4.12 s", "at once"),
    ]
    met = True
    sides: tuple[tuple[str, str, float, Api, str], ...] = (
        ("ollama", "qwen3:0.6b", 160.0, "ollama", "serial"),
        ("vllm", "Qwen/Qwen3-0.6B", 8.0, "openai", "batched"),
    )
    for kind, model, speed, api, expected in sides:
        with stand_in(folder, 1.0, kind, [model], tokens_per_second=speed) as url:
            result = run("concurrency", url, model, api, levels=(16,), output_len=32)
        times = sorted(record.end - record.start for record in result.runs[-1].good)
        verdict = result.verdicts[0].key
        met &= verdict == expected
        total = f"{result.runs[-1].duration:.2f} s"
        rows.append((f"stand-in of {kind}", f"{times[0]:.2f} s", f"{times[-1]:.2f} s", total, verdict))
    report.table("16 requests at once", ("", "fastest", "slowest", "total", "verdict"), rows)
    report.target("verdicts: serial and batched", met)


def tiers(folder: Path, report: Report) -> None:
    """20 images on a server that batches whatever comes, whose memory holds 10."""
    options = {"image_seconds": 16.5, "tokens_per_second": TOKENS, "out_of_memory_above": 10}
    model = "Qwen3-VL-4B"
    levels = (1, 10, 20)
    with stand_in(folder, report.scale, "vllm", [f"{model},vision"], **options) as url:
        direct = figures_of(run("vision-batch", url, model, levels=levels))
        with gateway(folder, "vllm", url, [model], max_concurrency=10) as through:
            ours = figures_of(run("vision-batch", through, model, levels=levels))
    reported = {1: "17.5 s", 10: "37.6 s", 20: "out of memory"}
    rows = [
        (
            str(files),
            reported[files],
            f"{report.seconds(direct[f'total_s_{files}'])}, {direct[f'failed_{files}']} failed",
            f"{report.seconds(ours[f'total_s_{files}'])}, {ours[f'failed_{files}']} failed",
        )
        for files in levels
    ]
    report.table("Images on a server whose memory holds 10", ("files", "reported", "stand-in", "concurrency 10"), rows)
    report.target("20 images: all fail, and none behind the limit", (direct["failed_20"], ours["failed_20"]) == (20, 0))


PARTS = {"images": images, "texts": texts, "sixteen": sixteen, "tiers": tiers}


def main() -> int:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts: {', '.join(PARTS)}")
    parser.add_argument("--time-scale", type=float, default=0.05, help="seconds for one second of a report")
    given = parser.parse_args()
    report = Report(given.time_scale)
    with tempfile.TemporaryDirectory() as folder:
        for part in given.only.split(","):
            PARTS[part](Path(folder), report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
