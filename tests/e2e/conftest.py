"""Servers of the end-to-end tests: every available engine, with a gateway in front of each."""

import base64
import io
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from gateway.simulate import Model, Options
from tests.e2e.engines import Engine, from_vllm, real_ollama, stand_in
from tests.e2e.gateway import REPOSITORY, Gateway
from tests.real_engines.vllm import MAX_MODEL_LEN, Vllm, tiny_models

VISION_MODEL, TEXT_MODEL, SHARED_MODEL = "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-8B", "Qwen/Qwen3-Shared"
VISION_SLOTS = 4  # few, so that a test can occupy all of them
TEXT_SLOTS = 64  # more than a gateway admits
# Slow enough that a long answer takes seconds, fast enough that a short one takes almost none.
TOKENS_PER_SECOND = 300.0
ANSWER_TOKENS = 64

# The long timeout is for the first test, which waits until the server has started.
REAL_VLLM = pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(600)])
REAL_OLLAMA = pytest.param("ollama", marks=pytest.mark.timeout(300))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests of the embedding vLLM first, so that it has ended when the two others start.

    Three servers at once need too much memory.
    """
    items.sort(key=lambda item: "embedder" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def vllms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """Two real vLLMs, one for images, one for text; both also serve `SHARED_MODEL`."""
    venv = vllm_venv()
    models, logs = tiny_models(venv), tmp_path_factory.mktemp("vllm")
    names = [VISION_MODEL, SHARED_MODEL]
    vision = Vllm(
        venv,
        models / "tiny-qwen3-vl",
        names,
        log=logs / "vision.log",
        max_num_seqs=VISION_SLOTS,
        structured_outputs=True,
    )
    text = Vllm(venv, models / "tiny-qwen3", [TEXT_MODEL, SHARED_MODEL], log=logs / "text.log", max_num_seqs=TEXT_SLOTS)
    with ExitStack() as stack:
        for server in (vision, text):
            stack.callback(server.stop)
            server.start()
        for server in (vision, text):
            server.wait_until_ready()
        engines = (
            from_vllm(vision, VISION_MODEL, VISION_SLOTS, MAX_MODEL_LEN, has_vision=True),
            from_vllm(text, TEXT_MODEL, TEXT_SLOTS, MAX_MODEL_LEN, has_vision=False),
        )
        for engine in engines:
            engine.ask([{"role": "user", "content": "Warm up."}], max_tokens=4)
        yield engines


def vllm_venv() -> Path:
    """Return the virtual environment of the real vLLM."""
    venv = REPOSITORY / os.environ.get("TEST_VLLM_VENV", ".venv-vllm")
    if not (venv / "bin" / "python").exists():
        pytest.fail(
            f"no vLLM in {venv}; run `python tests/real_engines/install_vllm.py {venv.name}`, "
            "or set TEST_VLLM_VENV to another virtual environment"
        )
    return venv


def vllm_stand_in(model: Model, slots: int) -> Options:
    models = (model, Model(SHARED_MODEL, context_length=model.context_length))
    return Options("vllm", models, tokens_per_second=TOKENS_PER_SECOND, answer_tokens=ANSWER_TOKENS, max_num_seqs=slots)


VISION_STAND_IN = vllm_stand_in(
    Model(VISION_MODEL, family="qwen3vl", vision=True, context_length=MAX_MODEL_LEN), VISION_SLOTS
)
TEXT_STAND_IN = vllm_stand_in(Model(TEXT_MODEL, family="qwen3", context_length=MAX_MODEL_LEN), TEXT_SLOTS)
OLLAMA_TOOL_MODEL = Model("qwen3-vl", family="qwen3vl", vision=True, tools=True)
OLLAMA_STAND_IN = Options(
    "ollama",
    (Model("qwen3-vl", family="qwen3vl", vision=True), Model("llama")),
    tokens_per_second=TOKENS_PER_SECOND,
    answer_tokens=ANSWER_TOKENS,
)


TOOL_STAND_INS = {
    "vllm-standin": replace(
        VISION_STAND_IN,
        models=(Model(VISION_MODEL, family="qwen3vl", vision=True, tools=True, context_length=MAX_MODEL_LEN),),
    ),
    "ollama-0.33-standin": replace(OLLAMA_STAND_IN, models=(OLLAMA_TOOL_MODEL,)),
    "ollama-0.24-standin": replace(OLLAMA_STAND_IN, models=(OLLAMA_TOOL_MODEL,), generation="0.24"),
}


@pytest.fixture(scope="session", params=[REAL_VLLM, "vllm-standin", "ollama-standin", "ollama"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Each available engine in turn. A test that uses it must pass on all of them."""
    match request.param:
        case "vllm":
            yield request.getfixturevalue("vllms")[0]
        case "vllm-standin":
            with stand_in(VISION_STAND_IN) as engine:
                yield engine
        case "ollama-standin":
            with stand_in(OLLAMA_STAND_IN) as engine:
                yield engine
        case "ollama":
            yield ollama_from_environment()


@pytest.fixture(scope="session", params=[REAL_VLLM, *TOOL_STAND_INS, REAL_OLLAMA])
def tool_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Each available engine in turn, with a model that can call tools, and both Ollama versions."""
    if request.param in TOOL_STAND_INS:
        with stand_in(TOOL_STAND_INS[request.param]) as engine:
            yield engine
    elif request.param == "vllm":
        yield request.getfixturevalue("vllms")[0]
    else:
        yield ollama_from_environment()


def ollama_from_environment() -> Engine:
    """Return the real Ollama that `TEST_OLLAMA_URL` names, or skip the test."""
    url = os.environ.get("TEST_OLLAMA_URL")
    if not url:
        pytest.skip("TEST_OLLAMA_URL is not set")
    return real_ollama(url, os.environ.get("TEST_OLLAMA_MODEL", "qwen3-vl"))


@pytest.fixture(scope="session", params=[REAL_VLLM, "vllm-standin"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Engine]]:
    """Two vLLMs with one model each, and one model name that both serve."""
    if request.param == "vllm":
        yield request.getfixturevalue("vllms")
        return
    with stand_in(VISION_STAND_IN) as vision, stand_in(TEXT_STAND_IN) as text:
        yield vision, text


@pytest.fixture(scope="session")
def gateway(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of `engine`, configured by environment variables only."""
    with Gateway(tmp_path_factory.mktemp("gateway"), engine.settings) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def tool_gateway(tool_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of `tool_engine`, configured by environment variables only."""
    with Gateway(tmp_path_factory.mktemp("gateway"), tool_engine.settings) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with gateway.openai() as client:
        yield client


@pytest.fixture
async def async_client(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with gateway.async_openai() as client:
        yield client


@pytest.fixture(scope="session")
def image_url() -> str:
    """Small PNG as a `data:` URL."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
