"""An operator moves a tier in steps, and back, while programs go on: no call fails, and each is served by the side that the roll-out says."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import inf
from pathlib import Path
from typing import NamedTuple

import httpx2
import openai
import pytest
from langchain_core.messages import BaseMessage
from langchain_openai import ChatOpenAI

from gateway.simulate import Model, Options
from tests.e2e.call import Call
from tests.e2e.engines import Engine, stand_in
from tests.e2e.gateway import ADMIN_KEY, KEY, Gateway
from tests.real_engines.process import wait_until

TIER, OLLAMA_MODEL = "standard", "qwen3-vl"
OLLAMA, VLLM = "ollama", "vllm"
CONVERSATIONS = 30
PATIENCE = 120.0  # seconds: beside other work two cores are slow
PARALLEL = 4
OLLAMA_STAND_IN = Options(
    "ollama",
    (Model(OLLAMA_MODEL, family="qwen3vl", vision=True, tools=True),),
    tokens_per_second=300,
    parallel=PARALLEL,
)

Sides = Mapping[int, str]
"""Who serves each conversation."""


@pytest.fixture(scope="module")
def ollama() -> Iterator[Engine]:
    with stand_in(OLLAMA_STAND_IN) as engine:
        yield engine


@pytest.fixture(scope="module")
def vllm(pair: tuple[Engine, Engine]) -> Engine:
    return pair[0]


@pytest.fixture
def gateway(ollama: Engine, vllm: Engine, tmp_path: Path) -> Iterator[Gateway]:
    """Before both, on Ollama, told by the environment. It lets no more through to the vLLM than that runs at once."""
    settings = {
        **vllm.settings,
        **ollama.settings,
        "GATEWAY__BACKENDS__VLLM__MAX_CONCURRENCY": str(vllm.lanes),
        "OLLAMA_NUM_PARALLEL": str(PARALLEL),
    }
    with Gateway(tmp_path, settings) as gateway:
        yield gateway


# In steps and back


class Asked(NamedTuple):
    """One call that succeeded, on the clock of `time.monotonic`."""

    conversation: int
    sent: float
    answered: float
    side: str


class Program:
    """ChatOpenAI in a loop on a thread of its own, one conversation after the other, over and over, as `model`."""

    def __init__(self, gateway: Gateway, model: str, stream: bool) -> None:
        self.name = f"{model}, {'streamed' if stream else 'plain'}"
        self.calls: list[Asked] = []
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
        """Calls sent after `moment` and answered."""
        assert self.failure is None, f"a call failed ({self.name}): {self.failure!r}"
        return sum(call.sent > moment for call in self.calls)

    def _run(self) -> None:
        try:
            with openai.DefaultHttpxClient(timeout=PATIENCE, trust_env=False) as http:
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
        told = answer.response_metadata
        assert told["finish_reason"] in ("stop", "length"), told
        headers = told["headers"]
        assert headers["x-gateway-tier"] == TIER
        self.calls.append(Asked(conversation, sent, time.monotonic(), headers["x-gateway-backend"]))


class Step(NamedTuple):
    """An operator's command, when it began and ended, and until when it counted for sure."""

    words: str
    began: float
    ended: float
    left: float


def take(gateway: Gateway, folder: Path, programs: list[Program], words: str) -> Step:
    """Run the command, and let each program have each conversation afterwards."""
    began = time.monotonic()
    done = gateway.command(folder, *words.split())
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    print(f"$ gateway {words}\n{done.stderr}{done.stdout}", end="")
    ended = time.monotonic()
    wait_until(
        lambda: min(program.since(ended) for program in programs),
        lambda calls: calls >= CONVERSATIONS,
        f"calls after `{words}`",
        PATIENCE,
    )
    return Step(words, began, ended, time.monotonic())


def sides_of(programs: list[Program], step: Step) -> dict[int, str]:
    """Who served each conversation between this step's end and the next one's beginning: one side alone, whatever the name and the program."""
    seen: dict[int, set[str]] = {}
    for program in programs:
        for call in program.calls:
            if call.sent > step.ended and call.answered < step.left:
                seen.setdefault(call.conversation, set()).add(call.side)
    assert {conversation: sides for conversation, sides in seen.items() if len(sides) > 1} == {}, (
        f"on both sides after `{step.words}`"
    )
    assert len(seen) == CONVERSATIONS
    return {conversation: sides.pop() for conversation, sides in seen.items()}


def log_of_sides(programs: list[Program], steps: list[Step]) -> str:
    """A letter for each call, in the order in which they were sent: by whom it was served."""
    lines = []
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        end = inf if following is None else following.began
        told = {
            program.name: "".join(call.side[0] for call in program.calls if step.began <= call.sent < end)
            for program in programs
        }
        lines += [f"{step.words}:", *(f"  {name:<36}{letters}" for name, letters in told.items())]
    return "\n".join(lines)


def check_those_between(programs: list[Program], steps: list[Step], sides: list[Sides]) -> None:
    """A call that a command met on its way was served by who had served before or by who did afterwards."""
    ends = [*(step.ended for step in steps[1:]), inf]
    for program in programs:
        for call in program.calls:
            here = [
                side
                for step, end, side in zip(steps, ends, sides, strict=True)
                if step.began < call.answered and call.sent < end
            ]
            assert call.side in {side[call.conversation] for side in here}, f"{program.name}: {call}"


@contextmanager
def watched(programs: list[Program], steps: list[Step]) -> Iterator[None]:
    """At the end of the block, whatever happened, the programs stop and the log of sides is printed: pytest shows it with a failure."""
    try:
        yield
    finally:
        for program in programs:
            program.stop()
        print(log_of_sides(programs, steps))


@pytest.mark.timeout(900)
def test_steps_to_vllm_and_back_fail_no_call_and_serve_from_the_right_side(
    gateway: Gateway, vllm: Engine, tmp_path: Path
) -> None:
    folder = tmp_path / "operator"
    folder.mkdir()
    programs = [Program(gateway, model, stream) for model in (TIER, vllm.model) for stream in (False, True)]
    steps: list[Step] = []
    with watched(programs, steps):
        for words in (
            "status",
            "switch vllm",
            *(f"switch vllm --canary {percent}" for percent in (10, 50, 100)),
            "rollback",
            "rollback",
        ):
            step = take(gateway, folder, programs, words)
            steps.append(step)
    assert [program.failure for program in programs] == [None] * len(programs)
    before, switched, tenth, half, all_of_it, back, again = sides = [sides_of(programs, step) for step in steps]
    for place, side in ((before, OLLAMA), (switched, VLLM), (all_of_it, VLLM), (back, OLLAMA), (again, OLLAMA)):
        assert set(place.values()) == {side}
    share = [Counter(place.values())[VLLM] for place in (tenth, half)]
    assert 1 <= share[0] <= CONVERSATIONS * 0.25
    assert CONVERSATIONS * 0.3 <= share[1] <= CONVERSATIONS * 0.7
    assert all(half[conversation] == VLLM for conversation, side in tenth.items() if side == VLLM)
    check_those_between(programs, steps, sides)
    history = json.loads(gateway.command(folder, "status", "--json").stdout)["rollout"]["history"]
    assert [change["cause"] for change in history] == ["operator"] * 5
    assert [change.get("is_rollback", False) for change in history] == [True, False, False, False, False]


# Those in line

WAITING = 6


class Crowd(NamedTuple):
    """Requests in the gateway: those that run at vLLM, and those that wait for each side."""

    running: int
    for_vllm: int
    for_ollama: int


def crowd(gateway: Gateway) -> Crowd:
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    backends = httpx2.get(f"{gateway.url}/ops/status", headers=headers, timeout=PATIENCE, trust_env=False).json()[
        "backends"
    ]
    waiting = {name: sum(backends[name]["waiting"].values()) for name in (VLLM, OLLAMA)}
    return Crowd(sum(backends[VLLM]["running"].values()), waiting[VLLM], waiting[OLLAMA])


@pytest.mark.timeout(900)
def test_rollback_moves_those_in_line_at_once_and_streams_that_run_end_where_they_are(
    gateway: Gateway, vllm: Engine, tmp_path: Path
) -> None:
    gateway.command(tmp_path, "switch", VLLM, "--force")
    served = vllm.now().served
    short = {"model": TIER, "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4}
    with ExitStack() as calls:
        streams = [
            calls.enter_context(Call(gateway.url, vllm.long_request(TIER, stream=True), KEY)) for _ in range(vllm.lanes)
        ]
        for stream in streams:
            stream.read_until(b"data: ", times=3)
        waiting = [
            calls.enter_context(Call(gateway.url, {**short, "stream": number % 2 == 0}, KEY))
            for number in range(WAITING)
        ]
        wait_until(lambda: crowd(gateway), lambda found: found == (vllm.lanes, WAITING, 0), "all others wait in line")
        answer = json.loads(gateway.command(tmp_path, "rollback", "--json").stdout)
        assert (answer["changed"], answer["moved"]) == (True, WAITING)
        for number, call in enumerate(waiting):
            received = call.read_until(b"data: [DONE]" if number % 2 == 0 else b'"finish_reason"')
            assert received.startswith(b"HTTP/1.1 200 ")
            assert b"x-gateway-backend: ollama" in received
        assert crowd(gateway) == (vllm.lanes, 0, 0), "those who moved have waited for those who run"
        for stream in streams:
            received = stream.read_until(b"data: [DONE]")
            assert b"x-gateway-backend: vllm" in received
            assert b'"finish_reason":"length"' in received
    assert vllm.now().served == served + vllm.lanes
