"""`gateway advise` against results and gateways."""

import json
from pathlib import Path

import pytest

from gateway import config, simulate
from gateway.bench.result_json import to_json
from tests.bench.advise.machine import result
from tests.cli.harness import command, invoke
from tests.fakes.running_gateway import running
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.usefixtures("empty_environment")


@pytest.fixture
def measured(tmp_path: Path) -> str:
    file = tmp_path / "users.json"
    file.write_text(json.dumps(to_json(result(users_realtime=10))))
    return str(file)


def test_a_result_leads_to_limits_that_meet_the_target(measured: str) -> None:
    found = invoke("advise", measured, "--target", "p95_ttft_ms<1000", "--kind", "vllm")
    assert found.exit_code == 0, found.output
    assert "max_concurrency   4" in found.stdout
    assert "The target is met with these limits." in found.stdout


def test_a_target_that_cannot_be_met_exits_with_1_and_json_tells_why(measured: str) -> None:
    found = invoke("advise", measured, "--target", "p95_ttft_ms<10", "--json", "--lang", "ko")
    body = json.loads(found.stdout)
    assert (found.exit_code, body["meets"], body["settings"]) == (1, False, [])
    assert body["remarks"][-1]["key"] == "never_met"


def test_a_target_that_the_data_do_not_show_to_be_met_exits_with_1(tmp_path: Path) -> None:
    file = tmp_path / "users.json"
    file.write_text(json.dumps(to_json(result((1,)))))
    found = invoke("advise", str(file), "--target", "p95_ttft_ms<1000")
    assert "The data carry no recommendation." in found.stdout
    assert found.exit_code == 1
    assert invoke("advise", str(file)).exit_code == 0


def test_the_cost_per_user_is_computed_against_a_result_before(measured: str, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    before.write_text(json.dumps(to_json(result(users_realtime=2))))
    words = (
        "advise",
        measured,
        "--price",
        "3600000",
        "--watts",
        "1000",
        "--kwh-price",
        "100",
        "--against",
        str(before),
    )
    found = invoke(*words)
    assert found.exit_code == 0, found.output
    assert "[computed] Cost: 173,050 a month" in found.stdout
    assert "[computed] 17,305 a month for each of 10 users at once" in found.stdout
    assert "20 % of the cost per user before, with 2 users at once then and 10 now" in found.stdout


async def test_a_gateway_is_advised_by_its_metrics() -> None:
    async with stand_in(simulate.Options("vllm", (simulate.Model("qwen"),))) as server:
        settings = config.build(
            {"backends": {"vllm": {"base_url": server.base_url}}, "tiers": {"standard": {"models": {"vllm": "qwen"}}},
             "llm_backend": "vllm", "state_file": ""}
        )  # fmt: skip
        async with running(settings) as here:
            few = await command("advise", here.base_url)
            for _ in range(30):
                assert (await here.ask({"max_tokens": 1, "stream": True})).status == 200
            found = await command("advise", here.base_url, "--target", "p95_ttft_ms<60000", "--users", "5", "--json")
    assert "vllm: 0 requests are too few for a statement" in few.stdout
    body = json.loads(found.stdout)
    assert (found.exit_code, body["meets"]) == (0, True)
    assert {"little", "slots", "target_met", "slots_suffice"} <= {remark["key"] for remark in body["remarks"]}
    assert {setting["name"] for setting in body["settings"]} == {"max_queue", "queue_timeout"}


@pytest.mark.parametrize(
    ("words", "expected", "status"),
    [
        (("missing",), "'missing' is neither a file nor an address", 2),
        (("http://127.0.0.1:1",), "cannot reach a gateway", 1),
        (("http://127.0.0.1:1", "--target", "fast"), "such as p95_ttft_ms<1000", 2),
        (("pyproject.toml",), "", 2),
    ],
)
def test_wrong_words_and_sources_are_named(words: tuple[str, ...], expected: str, status: int) -> None:
    Path("pyproject.toml").write_text("x")
    found = invoke("advise", *words)
    assert (found.exit_code, expected in found.stderr) == (status, True), found.stderr
