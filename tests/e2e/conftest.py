"""The suite's servers: every engine that is at hand, and a gateway in front of each."""

import base64
import io
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from gateway.simulate import Model, Options
from tests.e2e.engines import Engine, from_vllm, real_ollama, stand_in
from tests.e2e.gateway import KEY, REPOSITORY, Gateway
from tests.real_engines.vllm import MAX_MODEL_LEN, Vllm, tiny_models

VISION_MODEL, TEXT_MODEL, SHARED_MODEL = "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-8B", "Qwen/Qwen3-Shared"
LANES = 4  # few, so that a test can occupy them all
TEXT_LANES = 64  # more than a gateway lets through
# Slow enough that a long answer lasts for seconds, fast enough that a short one takes none.
TOKENS_PER_SECOND = 300.0
ANSWER_TOKENS = 64

REAL_VLLM = pytest.param(
    "vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(600)]
)  # the first test waits for the start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the vLLM that embeds comes first, so that it has ended when the two others start: three want much memory."""
    items.sort(key=lambda item: "embedder" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def vllms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """Two real vLLMs: one with images, one without; each also says that it serves `SHARED_MODEL`."""
    venv = vllm_venv()
    models, logs = tiny_models(venv), tmp_path_factory.mktemp("vllm")
    names = [VISION_MODEL, SHARED_MODEL]
    vision = Vllm(
        venv, models / "tiny-qwen3-vl", names, log=logs / "vision.log", max_num_seqs=LANES, structured_outputs=True
    )
    text = Vllm(venv, models / "tiny-qwen3", [TEXT_MODEL, SHARED_MODEL], log=logs / "text.log", max_num_seqs=TEXT_LANES)
    with ExitStack() as stack:
        for server in (vision, text):
            stack.callback(server.stop)
            server.start()
        for server in (vision, text):
            server.wait_until_ready()
        engines = (
            from_vllm(vision, VISION_MODEL, LANES, MAX_MODEL_LEN, has_vision=True),
            from_vllm(text, TEXT_MODEL, TEXT_LANES, MAX_MODEL_LEN, has_vision=False),
        )
        for engine in engines:
            engine.ask([{"role": "user", "content": "Warm up."}], max_tokens=4)
        yield engines


def vllm_venv() -> Path:
    """Where the real vLLM is installed."""
    venv = REPOSITORY / os.environ.get("TEST_VLLM_VENV", ".venv-vllm")
    if not (venv / "bin" / "python").exists():
        pytest.fail(
            f"no vLLM in {venv}; run `python tests/real_engines/install_vllm.py {venv.name}`, or name another place in TEST_VLLM_VENV"
        )
    return venv


def vllm_stand_in(model: Model, lanes: int) -> Options:
    models = (model, Model(SHARED_MODEL, context_length=model.context_length))
    return Options("vllm", models, tokens_per_second=TOKENS_PER_SECOND, answer_tokens=ANSWER_TOKENS, max_num_seqs=lanes)


VISION_STAND_IN = vllm_stand_in(Model(VISION_MODEL, family="qwen3vl", vision=True, context_length=MAX_MODEL_LEN), LANES)
TEXT_STAND_IN = vllm_stand_in(Model(TEXT_MODEL, family="qwen3", context_length=MAX_MODEL_LEN), TEXT_LANES)
OLLAMA_STAND_IN = Options(
    "ollama",
    (Model("qwen3-vl", family="qwen3vl", vision=True), Model("llama")),
    tokens_per_second=TOKENS_PER_SECOND,
    answer_tokens=ANSWER_TOKENS,
)


@pytest.fixture(scope="session", params=[REAL_VLLM, "vllm-standin", "ollama-standin", "ollama"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The engine that serves, one after the other. Every test that takes it holds for all."""
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
            url = os.environ.get("TEST_OLLAMA_URL")
            if not url:
                pytest.skip("TEST_OLLAMA_URL names no Ollama")
            yield real_ollama(url, os.environ.get("TEST_OLLAMA_MODEL", "qwen3-vl"))


@pytest.fixture(scope="session", params=[REAL_VLLM, "vllm-standin"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Engine]]:
    """Two vLLMs with a model each, and one name that both serve."""
    if request.param == "vllm":
        yield request.getfixturevalue("vllms")
        return
    with stand_in(VISION_STAND_IN) as vision, stand_in(TEXT_STAND_IN) as text:
        yield vision, text


@pytest.fixture(scope="session")
def gateway(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway before `engine`, told by the environment alone."""
    with Gateway(tmp_path_factory.mktemp("gateway"), engine.settings) as gateway:
        yield gateway


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, timeout=120.0) as client:
        yield client


@pytest.fixture
async def async_client(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, timeout=120.0) as client:
        yield client


@pytest.fixture(scope="session")
def picture() -> str:
    """A small PNG as a `data:` URL."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
