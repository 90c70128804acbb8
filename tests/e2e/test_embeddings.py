"""Embeddings through the gateway, on every available engine: a real vLLM, stand-ins, a real
Ollama.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from langchain_openai import OpenAIEmbeddings
from openai import OpenAI

from gateway.simulate import Model, Options
from tests.e2e.conftest import REAL_VLLM, vllm_venv
from tests.e2e.engines import stand_in
from tests.e2e.gateway import KEY, PLAIN_HTTP, Gateway
from tests.real_engines.vllm import MAX_MODEL_LEN, Vllm, tiny_models

MODEL = "their/embedding-model"
STAND_INS = {
    "vllm-standin": Options("vllm", (Model(MODEL, embedding=64, context_length=MAX_MODEL_LEN),)),
    "ollama-0.33-standin": Options("ollama", (Model(MODEL, embedding=64),)),
    "ollama-0.24-standin": Options("ollama", (Model(MODEL, embedding=64),), generation="0.24"),
}
CONFIG = """
llm_backend: active
backends:
  active: {{kind: {kind}, base_url: "{url}"}}
tiers:
  standard: {{models: {{active: "a chat model"}}}}
embeddings:
  ours: {{backend: active, model: "{model}"}}
"""

needs_ollama_clients = pytest.mark.skipif(
    importlib.util.find_spec("langchain_ollama") is None, reason="only `make test-clients` has Ollama's clients"
)


@pytest.fixture(scope="module", params=[REAL_VLLM, *STAND_INS, pytest.param("ollama", marks=pytest.mark.timeout(300))])
def embedder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str, str]]:
    """Kind, URL and model of an embedding engine."""
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
            pytest.skip("TEST_OLLAMA_URL and TEST_OLLAMA_EMBEDDING_MODEL are not both set")
        yield "ollama", url, model


@pytest.fixture(scope="module")
def gateway(embedder: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    kind, url, model = embedder
    with Gateway(tmp_path_factory.mktemp("gateway"), {}, CONFIG.format(kind=kind, url=url, model=model)) as gateway:
        yield gateway


def test_both_encodings_have_the_same_unit_vectors(client: OpenAI) -> None:
    """By default the client requests base64."""
    texts = ["The cat sat on the mat.", "고양이가 매트에 앉았다.", "x"]
    packed = client.embeddings.create(model="ours", input=texts)
    floats = client.embeddings.create(model="ours", input=texts, encoding_format="float")
    assert [item.index for item in packed.data] == [0, 1, 2]
    assert (packed.model, packed.usage.prompt_tokens) == ("ours", packed.usage.total_tokens)
    assert packed.usage.prompt_tokens >= 3
    for one, other in zip(packed.data, floats.data, strict=True):
        # An engine may round differently in another batch.
        assert one.embedding == pytest.approx(other.embedding, abs=0.02)
        assert sum(number * number for number in one.embedding) == pytest.approx(1, abs=0.02)


def test_vector_of_a_text_does_not_depend_on_its_batch(client: OpenAI) -> None:
    texts = [f"text number {number}" for number in range(40)]
    together = [item.embedding for item in client.embeddings.create(model="ours", input=texts).data]
    for index in (0, 17, 39):
        alone = client.embeddings.create(model="ours", input=texts[index]).data[0].embedding
        similarities = [sum(a * b for a, b in zip(alone, other, strict=True)) for other in together]
        assert similarities[index] == pytest.approx(max(similarities), abs=0.01)


def test_overlong_text_is_refused_not_truncated(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="ours", input=["short", "a b c d " * 3000])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")


def test_langchain_embeds_documents_and_queries(gateway: Gateway) -> None:
    with openai.DefaultHttpxClient(timeout=120, **PLAIN_HTTP) as http:
        embeddings = OpenAIEmbeddings(
            base_url=f"{gateway.url}/v1", api_key=KEY, model="ours", check_embedding_ctx_length=False, http_client=http
        )
        documents = embeddings.embed_documents(["one document", "another"])
        assert embeddings.embed_query("one document") == pytest.approx(documents[0], abs=0.02)


@needs_ollama_clients
@pytest.mark.parametrize("client_name", ["ollama-python", "OllamaEmbeddings", "LlamaIndex OllamaEmbedding"])
def test_clients_of_ollamas_api_embed(gateway: Gateway, client: OpenAI, client_name: str) -> None:
    """Check that each of Ollama's clients gets the vectors that OpenAI's API gives, on every engine."""
    texts = ["one document", "another"]
    expected = [item.embedding for item in client.embeddings.create(model="ours", input=texts).data]
    for one, other in zip(_embedded(client_name, gateway.url, texts), expected, strict=True):
        assert list(one) == pytest.approx(other, abs=0.02)


def _embedded(client_name: str, url: str, texts: list[str]) -> list[Any]:
    options: dict[str, Any] = {"headers": {"Authorization": f"Bearer {KEY}"}, **PLAIN_HTTP}
    embeddings: Any
    if client_name == "ollama-python":
        from ollama import Client

        own = Client(url, **options)
        vectors = list(own.embed("ours", texts).embeddings)
    elif client_name == "OllamaEmbeddings":
        from langchain_ollama import OllamaEmbeddings

        embeddings = OllamaEmbeddings(model="ours", base_url=url, client_kwargs=options)
        own, vectors = embeddings._client, embeddings.embed_documents(texts)
    else:
        from llama_index.embeddings.ollama import OllamaEmbedding

        embeddings = OllamaEmbedding("ours", base_url=url, client_kwargs=options)
        own, vectors = embeddings._client, embeddings.get_text_embedding_batch(texts)
    own._client.close()
    return vectors
