"""What is recorded of one exchange, on real sockets."""

import time
from typing import Any

import pytest

from gateway.dialects.openai_chat import CompletionForm
from tests.fakes.running_gateway import until
from tests.relay.serving import (
    KINDS,
    Kind,
    serving,
)

pytestmark = pytest.mark.uvloop


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_exchange_is_counted_and_logged(kind: Kind, stream: bool) -> None:
    async with serving(kind) as (gateway, _):
        await gateway.ask({"stream": stream})
        await until(gateway.is_idle)
        route = {"tier": "standard", "backend": kind}
        assert gateway.metric("gateway_requests_total", endpoint="chat", outcome="ok", **route) == 1
        assert gateway.metric("gateway_tokens_total", type="completion", **route) == 5
        assert gateway.metric("gateway_overhead_seconds_count") == 1
        seen = stream or kind == "ollama"  # its pieces are seen as they arrive
        assert gateway.metric("gateway_time_to_first_token_seconds_count", **route) == seen
        line = gateway.exchanges()[-1]
        assert (line["outcome"], line["status"], line["stream"], line["attempts"]) == ("ok", 200, stream, 1)


async def test_rendering_of_an_answer_counts_as_time_in_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's time ends when the whole answer is there, and not when the attempt ends."""
    render = CompletionForm.answer

    def slow(form: CompletionForm, *answer: Any) -> bytes:
        end = time.monotonic() + 0.2
        while time.monotonic() < end:  # the processor is busy
            pass
        return render(form, *answer)

    monkeypatch.setattr(CompletionForm, "answer", slow)
    async with serving("vllm") as (gateway, _):
        await gateway.ask()
        await until(gateway.is_idle)
        assert gateway.metric("gateway_overhead_seconds_sum") >= 0.2
