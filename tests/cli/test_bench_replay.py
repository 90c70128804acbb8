"""`gateway bench load --replay`, from the gateway's own recording to the verdict."""

import json
from pathlib import Path
from typing import Any

import pytest

from gateway import config, simulate
from tests.bench.traffic import recorded, write
from tests.cli.harness import command, invoke
from tests.fakes.running_gateway import running
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.usefixtures("empty_environment")


async def test_what_a_gateway_recorded_is_sent_again_to_another_backend(tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    ollama = simulate.Options("ollama", (simulate.Model("llama"),), parallel=4)
    vllm = simulate.Options("vllm", (simulate.Model("qwen", context_length=8192),))
    async with stand_in(ollama) as recorded_engine, stand_in(vllm) as other:
        document: dict[str, Any] = {
            "backends": {"ollama": {"base_url": recorded_engine.base_url}},
            "tiers": {"standard": {"models": {"ollama": "llama"}}},
            "record": str(file),
            "state_file": "",
        }
        async with running(config.build(document)) as gateway:
            turns = [{"role": "user", "content": "answer in 8 words, and tell of the spring " * 10}]
            for _ in range(3):
                answer = await gateway.ask({"messages": turns, "stream": True, "max_tokens": 9})
                turns += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "and then " * 20}]
        done = await command(
            "bench", "load", "--replay", str(file), "--speed", "50", "--url", other.base_url, "--json", "--disable-tqdm"
        )
        requests = [each["body"] for each in other.engine.requests if each["path"] == "/v1/chat/completions"][-3:]
    value = json.loads(done.stdout)
    assert done.exit_code == 0, done.output
    assert (value["completed"], value["failed"], value["figures"]["recorded_requests"]) == (3, 0, 3)
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert value["output_lens"] == [line["completion_tokens"] for line in lines]
    for sent, line in zip(value["input_lens"], lines, strict=True):
        assert sent == pytest.approx(line["prompt_tokens"], rel=0.15)
    assert [request["messages"][:1] for request in requests] == [requests[0]["messages"][:1]] * 3
    assert "spring" not in json.dumps(requests)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--replay", "missing.jsonl"), "--replay: missing.jsonl: No such file or directory"),
        (("--replay", "other.jsonl"), "not a recording of the setting `record`"),
        (("--speed", "2"), "--speed has no meaning without --replay"),
        (("--replay", "good.jsonl", "--speed", "0"), "--speed: 0: expected a positive number"),
        (("--replay", "good.jsonl", "--request-rate", "3"), "--request-rate has no meaning with --replay"),
    ],
)
def test_wrong_words_exit_with_2(words: tuple[str, ...], expected: str) -> None:
    Path("other.jsonl").write_text("{}\n")
    write(Path("good.jsonl"), recorded())
    found = invoke("bench", "load", *words)
    assert (found.exit_code, expected in found.stderr) == (2, True), found.stderr


def test_only_load_replays() -> None:
    found = invoke("bench", "soak", "--replay", "x")
    assert found.exit_code == 2
    assert "--replay has no meaning for soak" in found.stderr
