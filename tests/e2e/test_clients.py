"""Programs of real clients through the gateway, on every engine: a program written for OpenAI's API works, whichever engine answers."""

import asyncio
import importlib.util
import inspect
import os
from collections.abc import Iterator
from dataclasses import replace

import openai
import pytest

from gateway.simulate import Model
from tests.e2e.conftest import OLLAMA_STAND_IN, REAL_VLLM, VISION_MODEL, VISION_STAND_IN
from tests.e2e.engines import Engine, real_ollama, stand_in
from tests.e2e.gateway import KEY, Gateway
from tests.e2e.programs import langchain, openai_python
from tests.e2e.programs.place import Place, Program
from tests.real_engines.vllm import MAX_MODEL_LEN

# LlamaIndex's client (0.8) asks for openai below 3, and breaks with 3 where it forms a schema: it has a virtualenv of its own.
HAS_LLAMA_INDEX = importlib.util.find_spec("llama_index") is not None and int(openai.__version__.partition(".")[0]) < 3
if HAS_LLAMA_INDEX:
    from tests.e2e.programs import llama_index

PROGRAMS: tuple[Program, ...] = (
    *langchain.PROGRAMS,
    *openai_python.PROGRAMS,
    *(llama_index.PROGRAMS if HAS_LLAMA_INDEX else ()),
)
TIER = "standard"

STAND_INS = {
    "vllm-standin": replace(
        VISION_STAND_IN,
        models=(Model(VISION_MODEL, family="qwen3vl", vision=True, tools=True, context_length=MAX_MODEL_LEN),),
    ),
    "ollama-0.33-standin": replace(
        OLLAMA_STAND_IN, models=(Model("qwen3-vl", family="qwen3vl", vision=True, tools=True),)
    ),
    "ollama-0.24-standin": replace(
        OLLAMA_STAND_IN, models=(Model("qwen3-vl", family="qwen3vl", vision=True, tools=True),), generation="0.24"
    ),
}
REAL_OLLAMA = pytest.param("ollama", marks=pytest.mark.timeout(300))


@pytest.fixture(scope="module", params=[REAL_VLLM, *STAND_INS, REAL_OLLAMA])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, picture: str) -> Iterator[Place]:
    """The gateway before one engine after the other; the engine itself where `client_table` asks for that."""
    name: str = request.param
    if name in STAND_INS:
        with stand_in(STAND_INS[name]) as engine:
            yield from _before(engine, request.config, tmp_path_factory, picture, is_noise=False)
        return
    if name == "vllm":
        engine = request.getfixturevalue("vllms")[0]
    else:
        url = os.environ.get("TEST_OLLAMA_URL")
        if not url:
            pytest.skip("TEST_OLLAMA_URL names no Ollama")
        engine = real_ollama(url, os.environ.get("TEST_OLLAMA_MODEL", "qwen3-vl"))
    yield from _before(engine, request.config, tmp_path_factory, picture, is_noise=True)


def _before(
    engine: Engine, config: pytest.Config, folders: pytest.TempPathFactory, picture: str, is_noise: bool
) -> Iterator[Place]:
    seen = picture if engine.has_vision else None
    if config.getoption("direct", False):
        yield Place(f"{engine.url}/v1", "any", engine.model, engine.context, seen, is_noise)
        return
    with Gateway(folders.mktemp("gateway"), engine.settings) as gateway:
        yield Place(f"{gateway.url}/v1", KEY, TIER, engine.context, seen, is_noise)


@pytest.mark.parametrize(
    "program", [pytest.param(program, id=f"{program.client}: {program.does}") for program in PROGRAMS]
)
def test_program_works(place: Place, program: Program) -> None:
    if program.sees and place.picture is None:
        pytest.skip("the model takes no images")
    outcome = program.run(place)
    if inspect.iscoroutine(outcome):
        asyncio.run(outcome)
