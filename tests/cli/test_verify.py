"""`gateway verify`: its lines, its JSON and its exit status."""

import json

import pytest

from gateway import config, simulate
from tests.cli.harness import command
from tests.fakes.running_gateway import running
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.usefixtures("empty_environment")

VLLM = simulate.Options("vllm", (simulate.Model("qwen", tools=True, context_length=2048),))


async def test_each_check_is_a_line_and_a_right_server_exits_with_0() -> None:
    async with stand_in(VLLM) as server:
        result = await command("verify", f"{server.base_url}/v1/", "--only", "streaming, history")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "ok      streaming: ends with [DONE]" in lines
    assert lines[-2] == f"{server.base_url}, vLLM, model qwen"
    assert lines[-1].startswith("7 ok, 0 failed, 1 skipped in")


async def test_a_failed_check_exits_with_1_in_korean_too() -> None:
    ollama = simulate.Options("ollama", (simulate.Model("qwen", tools=True),))
    async with stand_in(ollama) as server:
        result = await command("verify", server.base_url, "--only", "errors", "--lang", "ko")
    assert result.exit_code == 1
    assert "실패      에러 처리: 컨텍스트보다 긴 프롬프트" in result.stdout


async def test_json_is_one_object_with_every_check() -> None:
    async with stand_in(VLLM) as server:
        result = await command(
            "verify", server.base_url, "--model", "qwen", "--only", "concurrency", "--json", "--users", "3"
        )
    body = json.loads(result.stdout)
    assert (result.exit_code, body["kind"], body["model"], body["failed"]) == (0, "vllm", "qwen", 0)
    assert [check["check"] for check in body["checks"]] == ["lists_models", "answers", "answers_at_once"]
    assert body["checks"][-1]["values"]["users"] == 3


async def test_a_gateways_preflight_is_run_with_the_admin_key_and_skipped_without() -> None:
    async with stand_in(VLLM) as server:
        document = {
            "backends": {"vllm": {"base_url": server.base_url}, "away": {"kind": "openai", "base_url": "http://127.0.0.1:1"}},
            "tiers": {"standard": {"models": {"vllm": "qwen", "away": "x"}}},
            "llm_backend": "vllm", "rollback_to": "vllm", "admin_key": "admin", "state_file": "",
        }  # fmt: skip
        async with running(config.build(document)) as here:
            arguments = ("verify", here.base_url, "--only", "preflight", "--seconds", "5")
            allowed = await command(*arguments, GATEWAY_ADMIN_KEY="admin")
            refused = await command(*arguments)
    assert allowed.exit_code == 1
    assert "failed  preflight: what a switch would break (a switch to away would break: standard:" in allowed.stdout
    assert refused.exit_code == 0
    assert (
        "skipped preflight: what a switch would break (it needs the admin key: set GATEWAY_ADMIN_KEY" in refused.stdout
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("vllm",), "add --preflight"),
        (("ftp://here",), "expected an address"),
        (("http://127.0.0.1:1", "--only", "speed"), "unknown group 'speed'"),
    ],
)
async def test_wrong_words_exit_with_2(words: tuple[str, ...], expected: str) -> None:
    result = await command("verify", *words)
    assert result.exit_code == 2
    assert expected in result.stderr


async def test_a_server_that_is_not_there_exits_with_1() -> None:
    result = await command("verify", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stdout.startswith("failed  server: lists its models (no answer:")
