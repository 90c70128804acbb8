"""Ollama's embeddings, native and OpenAI-compatible.

Follows EmbedHandler in Ollama's server/routes.go, 0.24 and 0.33.
"""

from typing import Any

from gateway.simulate.asgi import HttpExchange
from gateway.simulate.engine import Failed, Refused, SimulatedEngine
from gateway.simulate.ollama.catalog import Catalog
from gateway.simulate.ollama.generation import BUSY, Generations, send
from gateway.simulate.ollama.requests import EndpointError, OllamaApiError, decode, keep_alive, native_options
from gateway.simulate.ollama.responses import NATIVE_JSON, dump
from gateway.simulate.options import Model
from gateway.simulate.text import count_tokens
from gateway.simulate.vectors import Vector, embed, packed, short, unit

NATIVE_EMBED = {"model": "string", "truncate": "bool", "dimensions": "int", "options": "map[string]interface {}"}
V1_EMBED = {"model": "string", "dimensions": "int", "encoding_format": "string"}
SPECIAL_TOKENS = 2
"""Tokens that the model adds around each text."""


class Embeddings:
    """Embedding endpoints of one server."""

    def __init__(self, engine: SimulatedEngine, catalog: Catalog, generations: Generations) -> None:
        self._engine = engine
        self._catalog = catalog
        self._generations = generations
        self._newer = engine.options.generation == "0.33"

    async def native(self, exchange: HttpExchange) -> None:
        body = decode(exchange.body, "api.EmbedRequest", NATIVE_EMBED, "missing request body")
        began = self._engine.clock.now()
        vectors, tokens, load = await self._vectors(body)
        answer: dict[str, Any] = {"model": body["model"], "embeddings": vectors}
        if vectors:
            total = self._engine.clock.now() - began
            answer |= {
                "total_duration": max(1, int(total * 1e9)),
                "load_duration": max(1, int(load * 1e9)),
                "prompt_eval_count": tokens,
            }
        await send(exchange, NATIVE_JSON, dump(answer))

    async def v1(self, exchange: HttpExchange) -> None:
        body = decode(exchange.body, "openai.EmbedRequest", V1_EMBED, "EOF")
        if body.get("input") in (None, []):
            raise EndpointError(400, "invalid input")
        form = str(body.get("encoding_format") or "float")
        if form.lower() not in ("float", "base64"):
            raise EndpointError(
                400, f"Invalid value for 'encoding_format' = {form}. Supported values: ['float', 'base64']."
            )
        native: dict[str, Any] = {key: body[key] for key in ("model", "input", "dimensions") if key in body}
        if native["input"] == "":
            native["input"] = [""]
        vectors, tokens, _ = await self._vectors(native)
        encoded = [packed(vector) if form.lower() == "base64" else vector for vector in vectors]
        data = [
            {"object": "embedding", "embedding": embedding, "index": index} for index, embedding in enumerate(encoded)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        await send(
            exchange,
            "application/json",
            dump({"object": "list", "data": data, "model": body["model"], "usage": usage}) + b"\n",
        )

    async def _vectors(self, body: dict[str, Any]) -> tuple[list[Vector], int, float]:
        """Return the embeddings, the number of tokens, and the seconds that the load took."""
        texts = _texts(body.get("input"))
        model = self._model(body)
        if not texts:  # the request only loads the model
            async with self._generations.loaded(model, native_options(body).get("num_ctx"), keep_alive(body)) as (
                _,
                load,
            ):
                return [], 0, load
        try:
            generation = self._engine.begin()
        except Refused as exc:
            raise OllamaApiError(
                exc.status, BUSY if exc.status == 503 else "model runner has unexpectedly stopped"
            ) from exc
        context = native_options(body).get("num_ctx")
        async with (
            self._generations.loaded(model, context, keep_alive(body)) as (runner, load),
            self._engine.slot(runner.lane) as clock,
        ):
            if not model.embedding:
                newer = "This server does not support embeddings. Start it with `--embeddings`"
                raise OllamaApiError(501, newer if self._newer else "this model does not support embeddings")
            tokens = sum(self._fitted(text, runner.context_length, body.get("truncate") is not False) for text in texts)
            await generation.prefill(tokens, 0, clock)
            try:
                await generation.end(0, "stop")
            except Failed as exc:
                endpoint = "tokenize" if self._newer else "embedding"
                text = f'Post "http://127.0.0.1:38671/{endpoint}": EOF'
                raise OllamaApiError(400, text if self._newer else f"do embedding request: {text}") from exc
        vectors = [embed(text, model.embedding) for text in texts]
        wanted = body.get("dimensions") or 0
        return (
            [short(unit(vector[:wanted]) if 0 < wanted < len(vector) else vector) for vector in vectors],
            tokens,
            load,
        )

    def _model(self, body: dict[str, Any]) -> Model:
        name = str(body.get("model") or "")
        model = self._catalog.find(name)
        if model is None:
            raise OllamaApiError(
                404, f'model "{name}" not found, try pulling it first' if name else "model '' not found"
            )
        return model

    def _fitted(self, text: str, context: int, truncate: bool) -> int:
        """Return the number of tokens of `text`, truncated to the context.

        Raises:
            OllamaApiError: it is longer, and `truncate` is false.
        """
        tokens = count_tokens(text) + SPECIAL_TOKENS
        if tokens > context and not truncate:
            raise OllamaApiError(400, "the input length exceeds the context length")
        return min(tokens, context)


def _texts(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value] if value not in (None, "") else []
    if not all(isinstance(text, str) for text in texts):
        raise OllamaApiError(400, "invalid input type")
    return texts
