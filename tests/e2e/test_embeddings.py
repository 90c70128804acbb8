"""Embeddings through the gateway as a user starts it, on every engine that is at hand: a real vLLM, stand-ins, a real Ollama where one is named."""

import os
from collections.abc import Iterator

import openai
import pytest
from langchain_openai import OpenAIEmbeddings
from openai import OpenAI

from gateway.simulate import Model, Options
from tests.e2e.conftest import REAL_VLLM, vllm_venv
from tests.e2e.engines import stand_in
from tests.e2e.gateway import KEY, Gateway
from tests.real_engines.vllm import MAX_MODEL_LEN, Vllm, tiny_models

MODEL = "their/embedding-model"
STAND_INS = {
    "vllm-standin": Options("vllm", (Model(MODEL, embedding=64, context_length=MAX_MODEL_LEN),)),
    "ollama-0.33-standin": Options("ollama", (Model(MODEL, embedding=64),)),
    "ollama-0.24-standin": Options("ollama", (Model(MODEL, embedding=64),), generation="0.24"),
}
CONFIG = """
llm_backend: here
backends:
  here: {{kind: {kind}, base_url: "{url}"}}
tiers:
  standard: {{models: {{here: "a chat model"}}}}
embeddings:
  ours: {{backend: here, model: "{model}"}}
"""


@pytest.fixture(scope="module", params=[REAL_VLLM, *STAND_INS, pytest.param("ollama", marks=pytest.mark.timeout(300))])
def embedder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str, str]]:
    """Kind, address and model of an engine that embeds."""
    name: str = request.param
    if name in STAND_INS:
        with stand_in(STAND_INS[name]) as engine:
            yield engine.kind, engine.url, MODEL
    elif name == "vllm":
        venv = vllm_venv()
        server = Vllm(
            venv,
            tiny_models(venv) / "tiny-qwen3",
            [MODEL],
            log=tmp_path_factory.mktemp("vllm") / "embeds.log",
            embeds=True,
        )
        try:
            server.start()
            server.wait_until_ready()
            yield "vllm", server.url, MODEL
        finally:
            server.stop()
    else:
        url, model = os.environ.get("TEST_OLLAMA_URL"), os.environ.get("TEST_OLLAMA_EMBEDDING_MODEL")
        if not (url and model):
            pytest.skip("TEST_OLLAMA_URL and TEST_OLLAMA_EMBEDDING_MODEL name no Ollama that embeds")
        yield "ollama", url, model


@pytest.fixture(scope="module")
def gateway_url(embedder: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    kind, url, model = embedder
    with Gateway(tmp_path_factory.mktemp("gateway"), {}, CONFIG.format(kind=kind, url=url, model=model)) as gateway:
        yield f"{gateway.url}/v1"


@pytest.fixture
def client(gateway_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=gateway_url, api_key=KEY, max_retries=0, timeout=120.0) as client:
        yield client


def test_both_forms_hold_the_same_unit_vectors(client: OpenAI) -> None:
    """The client asks for base64 by itself."""
    texts = ["The cat sat on the mat.", "고양이가 매트에 앉았다.", "x"]
    packed = client.embeddings.create(model="ours", input=texts)
    floats = client.embeddings.create(model="ours", input=texts, encoding_format="float")
    assert [item.index for item in packed.data] == [0, 1, 2]
    assert (packed.model, packed.usage.prompt_tokens) == ("ours", packed.usage.total_tokens)
    assert packed.usage.prompt_tokens >= 3
    for one, other in zip(packed.data, floats.data, strict=True):
        assert one.embedding == pytest.approx(
            other.embedding, abs=0.02
        )  # an engine may round differently in another batch
        assert sum(number * number for number in one.embedding) == pytest.approx(1, abs=0.02)


def test_each_text_has_its_own_vector_whatever_stands_beside_it(client: OpenAI) -> None:
    texts = [f"text number {number}" for number in range(40)]
    together = [item.embedding for item in client.embeddings.create(model="ours", input=texts).data]
    for place in (0, 17, 39):
        alone = client.embeddings.create(model="ours", input=texts[place]).data[0].embedding
        nearness = [sum(a * b for a, b in zip(alone, other, strict=True)) for other in together]
        assert nearness[place] == pytest.approx(max(nearness), abs=0.01)


def test_text_that_is_too_long_is_refused_and_not_cut(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="ours", input=["short", "a b c d " * 3000])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")


def test_langchain_embeds_documents_and_queries(gateway_url: str) -> None:
    with openai.DefaultHttpxClient(timeout=120, trust_env=False) as http:
        embeddings = OpenAIEmbeddings(
            base_url=gateway_url, api_key=KEY, model="ours", check_embedding_ctx_length=False, http_client=http
        )
        documents = embeddings.embed_documents(["one document", "another"])
        assert embeddings.embed_query("one document") == pytest.approx(documents[0], abs=0.02)
