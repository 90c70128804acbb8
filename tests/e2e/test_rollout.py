"""An operator rolls a tier out in steps, and back, while client programs run.

No call fails, and each is served by the backend that the roll-out says.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import openai
import pytest
from langchain_core.messages import BaseMessage
from langchain_openai import ChatOpenAI

from gateway.simulate import Model, Options
from tests.e2e.call import Call
from tests.e2e.engines import Engine, stand_in
from tests.e2e.gateway import ADMIN_KEY, KEY, PLAIN_HTTP, Gateway
from tests.real_engines.process import wait_until

TIER, OLLAMA_MODEL = "standard", "qwen3-vl"
OLLAMA, VLLM = "ollama", "vllm"
CONVERSATIONS = 30
PATIENCE = 120.0  # seconds; two cores are slow beside other work
PARALLEL = 4
OLLAMA_STAND_IN = Options(
    "ollama",
    (Model(OLLAMA_MODEL, family="qwen3vl", vision=True, tools=True),),
    tokens_per_second=300,
    parallel=PARALLEL,
)

Assignment = Mapping[int, str]
"""Backend that serves each conversation."""


@pytest.fixture(scope="module")
def ollama() -> Iterator[Engine]:
    with stand_in(OLLAMA_STAND_IN) as engine:
        yield engine


@pytest.fixture(scope="module")
def vllm(pair: tuple[Engine, Engine]) -> Engine:
    return pair[0]


@pytest.fixture
def gateway(ollama: Engine, vllm: Engine, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway in front of both engines, on Ollama, configured by environment variables.

    It sends no more requests to the vLLM than that runs at once.
    """
    settings = {
        **vllm.settings,
        **ollama.settings,
        "GATEWAY__BACKENDS__VLLM__MAX_CONCURRENCY": str(vllm.slots),
        "OLLAMA_NUM_PARALLEL": str(PARALLEL),
    }
    with Gateway(tmp_path, settings) as gateway:
        yield gateway


# Roll-out in steps, and rollback


class ServedCall(NamedTuple):
    """One call that succeeded; times are those of `time.monotonic`."""

    conversation: int
    sent: float
    answered: float
    backend: str


class Program:
    """ChatOpenAI in an endless loop over the conversations, on a thread of its own."""

    def __init__(self, gateway: Gateway, model: str, stream: bool) -> None:
        self.name = f"{model}, {'streamed' if stream else 'plain'}"
        self.calls: list[ServedCall] = []
        self.failure: Exception | None = None
        self._gateway = gateway
        self._model = model
        self._stream = stream
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=self.name)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def since(self, moment: float) -> int:
        """Return the number of calls sent after `moment` and answered."""
        assert self.failure is None, f"a call failed ({self.name}): {self.failure!r}"
        return sum(call.sent > moment for call in self.calls)

    def _run(self) -> None:
        try:
            with openai.DefaultHttpxClient(timeout=PATIENCE, **PLAIN_HTTP) as http:
                chat = ChatOpenAI(
                    base_url=f"{self._gateway.url}/v1",
                    api_key=KEY,  # type: ignore[arg-type]
                    model=self._model,
                    max_tokens=4,  # type: ignore[call-arg]
                    max_retries=0,
                    include_response_headers=True,
                    http_client=http,
                )
                while not self._is_over.is_set():
                    self._ask(chat, len(self.calls) % CONVERSATIONS)
        except Exception as error:
            self.failure = error

    def _ask(self, chat: ChatOpenAI, conversation: int) -> None:
        question, sent = f"Tell me about the number {conversation}.", time.monotonic()
        answer: BaseMessage
        if self._stream:
            first, *rest = chat.stream(question)
            answer = sum(rest, start=first)  # type: ignore[assignment]
        else:
            answer = chat.invoke(question)
        metadata = answer.response_metadata
        assert metadata["finish_reason"] in ("stop", "length"), metadata
        headers = metadata["headers"]
        assert headers["x-gateway-tier"] == TIER
        self.calls.append(ServedCall(conversation, sent, time.monotonic(), headers["x-gateway-backend"]))


class Step(NamedTuple):
    """An operator's command, when it began and ended, and until when its result certainly
    applied.
    """

    command: str
    began: float
    ended: float
    left: float


def take_step(gateway: Gateway, folder: Path, programs: list[Program], command: str) -> Step:
    """Run the command, then wait until each program has gone through all conversations."""
    began = time.monotonic()
    done = gateway.command(folder, *command.split())
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    print(f"$ gateway {command}\n{done.stderr}{done.stdout}", end="")
    ended = time.monotonic()
    wait_until(
        lambda: min(program.since(ended) for program in programs),
        lambda calls: calls >= CONVERSATIONS,
        f"calls after `{command}`",
        PATIENCE,
    )
    return Step(command, began, ended, time.monotonic())


def assignment_after(programs: list[Program], step: Step) -> dict[int, str]:
    """Return the backend that served each conversation between this step and the next one.

    It must be one backend only, whatever the model name and the program.
    """
    seen: dict[int, set[str]] = {}
    for program in programs:
        for call in program.calls:
            if call.sent > step.ended and call.answered < step.left:
                seen.setdefault(call.conversation, set()).add(call.backend)
    split = {conversation: backends for conversation, backends in seen.items() if len(backends) > 1}
    assert split == {}, f"on both backends after `{step.command}`"
    assert len(seen) == CONVERSATIONS
    return {conversation: backends.pop() for conversation, backends in seen.items()}


def backend_log(programs: list[Program], steps: list[Step]) -> str:
    """Return the first letter of the backend of each call, in the order in which they were sent."""
    lines = []
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        end = inf if following is None else following.began
        letters_of = {
            program.name: "".join(call.backend[0] for call in program.calls if step.began <= call.sent < end)
            for program in programs
        }
        lines += [f"{step.command}:", *(f"  {name:<36}{letters}" for name, letters in letters_of.items())]
    return "\n".join(lines)


def check_calls_during_steps(programs: list[Program], steps: list[Step], assignments: list[Assignment]) -> None:
    """Check that a call during a command was served by the backend before or after it."""
    ends = [*(step.ended for step in steps[1:]), inf]
    for program in programs:
        for call in program.calls:
            possible = [
                assignment
                for step, end, assignment in zip(steps, ends, assignments, strict=True)
                if step.began < call.answered and call.sent < end
            ]
            backends = {assignment[call.conversation] for assignment in possible}
            assert call.backend in backends, f"{program.name}: {call}"


@contextmanager
def watched(programs: list[Program], steps: list[Step]) -> Iterator[None]:
    """Stop the programs at the end of the block and print the backends, which pytest shows on
    failure.
    """
    try:
        yield
    finally:
        for program in programs:
            program.stop()
        print(backend_log(programs, steps))


@pytest.mark.timeout(900)
def test_steps_to_vllm_and_back_fail_no_call_and_use_the_right_backend(
    gateway: Gateway, vllm: Engine, tmp_path: Path
) -> None:
    folder = tmp_path / "operator"
    folder.mkdir()
    programs = [Program(gateway, model, stream) for model in (TIER, vllm.model) for stream in (False, True)]
    steps: list[Step] = []
    with watched(programs, steps):
        for command in (
            "status",
            "switch vllm",
            *(f"switch vllm --canary {percent}" for percent in (10, 50, 100)),
            "rollback",
            "rollback",
        ):
            step = take_step(gateway, folder, programs, command)
            steps.append(step)
    assert [program.failure for program in programs] == [None] * len(programs)
    assignments = [assignment_after(programs, step) for step in steps]
    before, switched, tenth, half, everything, back, again = assignments
    expected = ((before, OLLAMA), (switched, VLLM), (everything, VLLM), (back, OLLAMA), (again, OLLAMA))
    for assignment, backend in expected:
        assert set(assignment.values()) == {backend}
    share = [Counter(assignment.values())[VLLM] for assignment in (tenth, half)]
    assert 1 <= share[0] <= CONVERSATIONS * 0.25
    assert CONVERSATIONS * 0.3 <= share[1] <= CONVERSATIONS * 0.7
    assert all(half[conversation] == VLLM for conversation, backend in tenth.items() if backend == VLLM)
    check_calls_during_steps(programs, steps, assignments)
    history = json.loads(gateway.command(folder, "status", "--json").stdout)["rollout"]["history"]
    assert [change["cause"] for change in history] == ["operator"] * 5
    assert [change.get("is_rollback", False) for change in history] == [True, False, False, False, False]


# Queued requests

WAITING = 6
STREAM_TOKENS = 2000  # the stand-in streams them in 7 s, much longer than a rollback takes
AS_OPERATOR: dict[str, Any] = {"headers": {"authorization": f"Bearer {ADMIN_KEY}"}, "timeout": PATIENCE, **PLAIN_HTTP}


class QueueCounts(NamedTuple):
    """Requests in the gateway: running on vLLM, and queued for each backend."""

    running: int
    for_vllm: int
    for_ollama: int


def queue_counts(gateway: Gateway) -> QueueCounts:
    backends = httpx2.get(f"{gateway.url}/ops/status", **AS_OPERATOR).json()["backends"]
    waiting = {name: sum(backends[name]["waiting"].values()) for name in (VLLM, OLLAMA)}
    return QueueCounts(sum(backends[VLLM]["running"].values()), waiting[VLLM], waiting[OLLAMA])


@pytest.mark.timeout(900)
def test_rollback_moves_queued_requests_immediately_and_leaves_running_streams_alone(
    gateway: Gateway, vllm: Engine, tmp_path: Path
) -> None:
    gateway.command(tmp_path, "switch", VLLM, "--force")
    served = vllm.current_load().served
    short = {"model": TIER, "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4}
    with ExitStack() as calls:
        long = vllm.long_request(TIER, stream=True) | {"max_tokens": STREAM_TOKENS}
        streams = [calls.enter_context(Call(gateway.url, long, KEY)) for _ in range(vllm.slots)]
        for stream in streams:
            stream.read_until(b"data: ", times=3)
        waiting = [
            calls.enter_context(Call(gateway.url, {**short, "stream": number % 2 == 0}, KEY))
            for number in range(WAITING)
        ]
        wait_until(
            lambda: queue_counts(gateway), lambda found: found == (vllm.slots, WAITING, 0), "the others are queued"
        )
        answer = httpx2.post(f"{gateway.url}/ops/rollback", json={}, **AS_OPERATOR).json()
        assert (answer["changed"], answer["moved"]) == (True, WAITING)
        for number, call in enumerate(waiting):
            received = call.read_until(b"data: [DONE]" if number % 2 == 0 else b'"finish_reason"')
            assert received.startswith(b"HTTP/1.1 200 ")
            assert b"x-gateway-backend: ollama" in received
        assert queue_counts(gateway) == (vllm.slots, 0, 0), "the moved requests waited for the running streams"
        for stream in streams:
            received = stream.read_until(b"data: [DONE]")
            assert b"x-gateway-backend: vllm" in received
            assert b'"finish_reason":"length"' in received
    assert vllm.current_load().served == served + vllm.slots
