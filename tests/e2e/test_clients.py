"""Programs of real client libraries, written for OpenAI's API and for Ollama's own, on every engine
behind the gateway.
"""

import asyncio
import importlib.util
import inspect

import openai
import pytest

from tests.e2e.engines import Engine
from tests.e2e.gateway import KEY, Gateway
from tests.e2e.programs import langchain, openai_completions, openai_python, openai_responses
from tests.e2e.programs.target import Program, Target

# LlamaIndex's client (0.8) requires openai below 3, and fails to build a schema with 3: it has its
# own virtualenv.
HAS_LLAMA_INDEX = importlib.util.find_spec("llama_index") is not None and int(openai.__version__.partition(".")[0]) < 3
if HAS_LLAMA_INDEX:
    from tests.e2e.programs import llama_index
HAS_OLLAMA = importlib.util.find_spec("ollama") is not None and importlib.util.find_spec("langchain_ollama") is not None
if HAS_OLLAMA:
    from tests.e2e.programs import ollama_clients
HAS_ANTHROPIC = importlib.util.find_spec("anthropic") is not None
if HAS_ANTHROPIC:
    from tests.e2e.programs import anthropic_python
HAS_AGENTS = importlib.util.find_spec("agents") is not None
if HAS_AGENTS:
    from tests.e2e.programs import openai_agents
HAS_LITELLM = importlib.util.find_spec("litellm") is not None
if HAS_LITELLM:
    from tests.e2e.programs import litellm_clients

PROGRAMS: tuple[Program, ...] = (
    *langchain.PROGRAMS,
    *openai_python.PROGRAMS,
    *openai_completions.PROGRAMS,
    *openai_responses.PROGRAMS,
    *(anthropic_python.PROGRAMS if HAS_ANTHROPIC else ()),
    *(openai_agents.PROGRAMS if HAS_AGENTS else ()),
    *(litellm_clients.PROGRAMS if HAS_LITELLM else ()),
    *(llama_index.PROGRAMS if HAS_LLAMA_INDEX else ()),
    *(ollama_clients.PROGRAMS if HAS_OLLAMA else ()),
)
TIER = "standard"


@pytest.fixture
def target(tool_engine: Engine, image_url: str, request: pytest.FixtureRequest) -> Target:
    """A gateway in front of each engine in turn; with `--direct`, the engine itself."""
    own_image = image_url if tool_engine.has_vision else None
    if request.config.getoption("direct", False):
        url, key, model = f"{tool_engine.url}/v1", "any", tool_engine.model
    else:
        gateway: Gateway = request.getfixturevalue("tool_gateway")
        url, key, model = f"{gateway.url}/v1", KEY, TIER
    return Target(url, key, model, tool_engine.context, own_image, has_random_weights=tool_engine.is_real)


@pytest.mark.parametrize(
    "program", [pytest.param(program, id=f"{program.client}: {program.action}") for program in PROGRAMS]
)
def test_program_works(target: Target, program: Program) -> None:
    if program.needs_vision and target.image_url is None:
        pytest.skip("the model does not accept images")
    outcome = program.run(target)
    if inspect.iscoroutine(outcome):
        asyncio.run(outcome)
