"""`gateway simulate`: its options, and the address that it prints."""

import signal

import httpx2
import pytest

from tests.cli.harness import invoke, process

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_stand_in_prints_its_address_and_serves() -> None:
    with process("simulate", "--kind", "ollama", "--model", "llama,tools,context=1000") as started:
        assert started.stdout is not None
        try:
            url = started.stdout.readline().strip()
            listed = httpx2.get(f"{url}/api/tags", trust_env=False, timeout=20).json()
            assert [model["name"] for model in listed["models"]] == ["llama:latest"]
        finally:
            started.send_signal(signal.SIGTERM)
        started.communicate(timeout=20)


def test_any_option_of_a_stand_in_can_be_set() -> None:
    with process(
        "simulate", "--kind", "ollama", "--model", "llama", "--set", "gpu=yes", "--set", "time_scale=0.5"
    ) as started:
        assert started.stdout is not None
        try:
            assert started.stdout.readline().startswith("http://127.0.0.1:")
        finally:
            started.send_signal(signal.SIGTERM)
        started.communicate(timeout=20)
    result = invoke("simulate", "--kind", "ollama", "--set", "gpu=maybe")
    assert (result.exit_code, result.stderr) == (2, "--set: 'gpu=maybe': gpu must be yes or no\n")


def test_model_of_a_stand_in_with_an_unknown_property_exits_with_2() -> None:
    result = invoke("simulate", "--kind", "vllm", "--model", "m,wings")
    assert result.exit_code == 2
    assert result.stderr.startswith("--model: unknown model option 'wings'")
