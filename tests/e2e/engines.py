"""The engines behind the gateway: where they are, what they count, what they themselves say when asked past it."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import httpx2

from gateway.simulate import Options, running
from tests.e2e.call import Call
from tests.real_engines.process import wait_until
from tests.real_engines.vllm import Load, Vllm

Message = dict[str, Any]

LONG_QUESTION = (
    "Write 3900 words about the sea."  # a stand-in takes the number at its word; the others go on by themselves
)
LONG_TOKENS = 3900


class Said(NamedTuple):
    """An engine's own answer, past the gateway."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Engine:
    """One server of `kind` at `url` (without a path). `lanes` requests run at once there; `context` is in tokens.

    `load` is None where the engine tells nobody. `long_sampling` keeps a long answer from ending early.
    """

    kind: Literal["ollama", "vllm"]
    url: str
    model: str
    context: int
    lanes: int
    load: Callable[[], Load] | None = None
    has_vision: bool = True
    long_sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})

    @property
    def settings(self) -> dict[str, str]:
        """What a user would put into the environment to have the gateway use it."""
        if self.kind == "vllm":
            return {"LLM_BACKEND": "vllm", "VLLM_BASE_URL": f"{self.url}/v1", "VLLM_MODEL": self.model}
        return {"LLM_BACKEND": "ollama", "OLLAMA_BASE_URL": self.url, "OLLAMA_MODEL": self.model}

    def long_request(self, model: str, stream: bool) -> dict[str, Any]:
        """A request that keeps an engine busy for some seconds."""
        messages = [{"role": "user", "content": LONG_QUESTION}]
        return {"model": model, "messages": messages, "max_tokens": LONG_TOKENS, "stream": stream, **self.long_sampling}

    def ask(self, messages: Sequence[Message], max_tokens: int) -> Said:
        """Ask the engine itself, at temperature 0."""
        if self.kind == "vllm":
            body: dict[str, Any] = {
                "model": self.model,
                "messages": list(messages),
                "max_tokens": max_tokens,
                "temperature": 0,
            }
            answer = self._post("/v1/chat/completions", body)
            usage = answer["usage"]
            return Said(answer["choices"][0]["message"]["content"], usage["prompt_tokens"], usage["completion_tokens"])
        options = {"num_predict": max_tokens, "temperature": 0}
        body = {
            "model": self.model,
            "messages": [_native(message) for message in messages],
            "stream": False,
            "options": options,
        }
        answer = self._post("/api/chat", body)
        return Said(answer["message"]["content"], answer["prompt_eval_count"], answer["eval_count"])

    @contextmanager
    def fully_occupied(self) -> Iterator[None]:
        """Every lane taken by a long answer that somebody else reads."""
        with ExitStack() as calls:
            for _ in range(self.lanes):
                calls.enter_context(Call(self.url, self.long_request(self.model, stream=True) | {"ignore_eos": True}))
            self.wait_for("every lane is taken", lambda load: load.running == self.lanes)
            yield

    def wait_for(self, what: str, condition: Callable[[Load], bool], seconds: float = 20.0) -> None:
        wait_until(self.now, condition, f"{what} ({self.url})", seconds)

    @contextmanager
    def no_answer_ended(self) -> Iterator[None]:
        """What is asked for in the block is given up, not finished: the engine falls idle, and counts no answer more than before.

        That it falls idle alone would prove nothing, since every answer ends some day.
        """
        served = self.now().served
        yield
        self.wait_until_idle()
        assert self.now().served == served, "the engine has worked on to the end of an answer that nobody wanted"

    def now(self) -> Load:
        assert self.load is not None, f"this {self.kind} does not tell its load"
        return self.load()

    def wait_until_idle(self) -> None:
        self.wait_for("the engine works on nothing", lambda load: load.running == load.waiting == 0)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = httpx2.post(self.url + path, json=body, timeout=120.0, trust_env=False)
        answer.raise_for_status()
        return answer.json()


def _native(message: Message) -> Message:
    """A message of OpenAI's as Ollama's own API has it."""
    content = message["content"]
    if isinstance(content, str):
        return message
    text = "".join(part["text"] for part in content if part["type"] == "text")
    images = [part["image_url"]["url"].partition(",")[2] for part in content if part["type"] == "image_url"]
    return {"role": message["role"], "content": text, "images": images}


def from_vllm(server: Vllm, model: str, lanes: int, context: int, has_vision: bool) -> Engine:
    return Engine("vllm", server.url, model, context, lanes, server.load, has_vision)


@contextmanager
def stand_in(options: Options) -> Iterator[Engine]:
    """A stand-in on a thread of its own, with an event loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=f"stand-in of {options.kind}")
    thread.start()

    def do(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30.0)

    server = running(options)
    try:
        do(server.__aenter__())
        model = options.served[0]
        lanes = options.max_num_seqs if options.kind == "vllm" else options.parallel

        def load() -> Load:
            return Load(server.engine.running, server.engine.waiting, server.engine.served)

        yield Engine(options.kind, server.base_url, model.name, model.context_length, lanes, load, model.vision)
    finally:
        do(server.__aexit__(None, None, None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def real_ollama(url: str, model: str) -> Engine:
    """An Ollama that runs somewhere; it loads `model` first, since only a loaded model tells its context."""
    url = url.rstrip("/").removesuffix("/v1")
    with httpx2.Client(base_url=url, timeout=600.0, trust_env=False) as client:
        client.post("/api/chat", json={"model": model, "messages": []}).raise_for_status()
        shown = client.post("/api/show", json={"model": model}).raise_for_status().json()
        loaded = client.get("/api/ps").raise_for_status().json()["models"]
    names = {model, f"{model}:latest"}
    context = next(entry["context_length"] for entry in loaded if entry["name"] in names)
    # With random weights and temperature 0 an answer is one token over and over, and Ollama gives up after 30 of them.
    return Engine("ollama", url, model, context, 1, None, "vision" in shown.get("capabilities", []), {"temperature": 1})
