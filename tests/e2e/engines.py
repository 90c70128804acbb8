"""Engines behind the gateway: their addresses, their load, and their own answers without the
gateway.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import httpx2

from gateway.simulate import Options, running
from tests.e2e.call import Call
from tests.e2e.gateway import PLAIN_HTTP, Gateway
from tests.real_engines.process import wait_until
from tests.real_engines.vllm import Load, Vllm

Message = dict[str, Any]

# A stand-in writes exactly as many words; the other engines just write a long answer.
LONG_QUESTION = "Write 3900 words about the sea."
LONG_TOKENS = 3900


class DirectAnswer(NamedTuple):
    """An engine's own answer, without the gateway."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Engine:
    """One server of `kind` at `url` (without a path).

    It runs `slots` requests at once; `context` is in tokens. `load` is None if the engine does not
    report its load. `long_sampling` keeps a long answer from ending early.
    """

    kind: Literal["ollama", "vllm"]
    url: str
    model: str
    context: int
    slots: int
    load: Callable[[], Load] | None = None
    has_vision: bool = True
    is_real: bool = False
    long_sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})

    @property
    def settings(self) -> dict[str, str]:
        """Environment variables with which a user makes the gateway use this engine."""
        if self.kind == "vllm":
            return {"LLM_BACKEND": "vllm", "VLLM_BASE_URL": f"{self.url}/v1", "VLLM_MODEL": self.model}
        return {"LLM_BACKEND": "ollama", "OLLAMA_BASE_URL": self.url, "OLLAMA_MODEL": self.model}

    def long_request(self, model: str, stream: bool) -> dict[str, Any]:
        """Return a request that keeps an engine busy for some seconds."""
        messages = [{"role": "user", "content": LONG_QUESTION}]
        return {"model": model, "messages": messages, "max_tokens": LONG_TOKENS, "stream": stream, **self.long_sampling}

    def long_arguments(self, model: str, stream: bool) -> dict[str, Any]:
        """Return the same for openai-python, which takes only the fields of OpenAI's API as arguments."""
        request = self.long_request(model, stream)
        return request | {"extra_body": {name: request.pop(name) for name in {"ignore_eos"} & request.keys()}}

    def ask(self, messages: Sequence[Message], max_tokens: int) -> DirectAnswer:
        """Ask the engine directly, at temperature 0."""
        if self.kind == "vllm":
            body: dict[str, Any] = {
                "model": self.model,
                "messages": list(messages),
                "max_tokens": max_tokens,
                "temperature": 0,
            }
            answer = self._post("/v1/chat/completions", body)
            usage = answer["usage"]
            return DirectAnswer(
                answer["choices"][0]["message"]["content"], usage["prompt_tokens"], usage["completion_tokens"]
            )
        options = {"num_predict": max_tokens, "temperature": 0}
        body = {
            "model": self.model,
            "messages": [_native(message) for message in messages],
            "stream": False,
            "options": options,
        }
        answer = self._post("/api/chat", body)
        return DirectAnswer(answer["message"]["content"], answer["prompt_eval_count"], answer["eval_count"])

    @contextmanager
    def fully_occupied(self) -> Iterator[None]:
        """Occupy every slot with a long answer to another client."""
        with ExitStack() as calls:
            for _ in range(self.slots):
                calls.enter_context(Call(self.url, self.long_request(self.model, stream=True) | {"ignore_eos": True}))
            self.wait_for("every slot is taken", lambda load: load.running == self.slots)
            yield

    def wait_for(self, what: str, condition: Callable[[Load], bool]) -> None:
        """Wait until `condition` holds for the engine's load.

        A real vLLM reports its load after each step. Its engine and its worker wake each other by
        messages between processes, and on two cores a step can take many seconds.
        """
        wait_until(self.current_load, condition, f"{what} ({self.url})", seconds=120.0 if self.is_real else 20.0)

    @contextmanager
    def aborts_all_answers(self, gateway: Gateway) -> Iterator[None]:
        """Check that the gateway releases all slots at once, and that the engine aborts all answers
        requested in the block instead of finishing them.

        The engine must become idle without having served an answer more. Becoming idle alone would
        prove nothing, because every answer ends at some time.
        """
        served = self.current_load().served
        yield
        gateway.wait_until_idle()
        self.wait_until_idle()
        assert self.current_load().served == served, "the engine has finished an answer whose client had left"

    def current_load(self) -> Load:
        assert self.load is not None, f"this {self.kind} does not report its load"
        return self.load()

    def wait_until_idle(self) -> None:
        self.wait_for("the engine is idle", lambda load: load.running == load.waiting == 0)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = httpx2.post(self.url + path, json=body, timeout=120.0, **PLAIN_HTTP)
        answer.raise_for_status()
        return answer.json()


def _native(message: Message) -> Message:
    """Convert an OpenAI message to Ollama's native API."""
    content = message["content"]
    if isinstance(content, str):
        return message
    text = "".join(part["text"] for part in content if part["type"] == "text")
    images = [part["image_url"]["url"].partition(",")[2] for part in content if part["type"] == "image_url"]
    return {"role": message["role"], "content": text, "images": images}


def from_vllm(server: Vllm, model: str, slots: int, context: int, has_vision: bool) -> Engine:
    # Even at temperature 0, the last digits depend on what else the engine computes, and with them the end.
    endless = {"temperature": 0, "ignore_eos": True}
    return Engine(
        "vllm", server.url, model, context, slots, server.load, has_vision, is_real=True, long_sampling=endless
    )


@contextmanager
def stand_in(options: Options) -> Iterator[Engine]:
    """Serve a stand-in on a thread with its own event loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=f"stand-in of {options.kind}")
    thread.start()

    def do(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30.0)

    server = running(options)
    try:
        do(server.__aenter__())
        model = options.served[0]
        slots = options.max_num_seqs if options.kind == "vllm" else options.parallel

        def load() -> Load:
            return Load(server.engine.running, server.engine.waiting, server.engine.served)

        yield Engine(options.kind, server.base_url, model.name, model.context_length, slots, load, model.vision)
    finally:
        do(server.__aexit__(None, None, None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def real_ollama(url: str, model: str) -> Engine:
    """Return a running Ollama, after loading `model`: only a loaded model reports its context."""
    url = url.rstrip("/").removesuffix("/v1")
    with httpx2.Client(base_url=url, timeout=600.0, **PLAIN_HTTP) as client:
        client.post("/api/chat", json={"model": model, "messages": []}).raise_for_status()
        shown = client.post("/api/show", json={"model": model}).raise_for_status().json()
        loaded = client.get("/api/ps").raise_for_status().json()["models"]
    names = {model, f"{model}:latest"}
    context = next(entry["context_length"] for entry in loaded if entry["name"] in names)
    # With random weights and temperature 0 an answer repeats one token, and Ollama aborts after 30
    # of them.
    has_vision = "vision" in shown.get("capabilities", [])
    return Engine("ollama", url, model, context, 1, None, has_vision, is_real=True, long_sampling={"temperature": 1})
