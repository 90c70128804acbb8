"""The relay of one request for embeddings."""

import asyncio

from gateway.body_memory import HeldBody
from gateway.chat.answer import Usage
from gateway.chat.embedding import EncodedVector, converted, width
from gateway.dialects.dialect import EmbeddingForm
from gateway.engines.embeddings import Embedded
from gateway.engines.engine import MAX_REFUSAL
from gateway.engines.long_strings import render_texts
from gateway.errors import InvalidRequest, UpstreamError
from gateway.relay.base import Relay
from gateway.relay.context import RelayContext
from gateway.relay.requests import ClientConnection, EmbeddingRequest
from gateway.relay.turns import YIELD_BYTES, in_turns
from gateway.telemetry.exchange import EMBEDDINGS
from gateway.upstream.failures import check_headers, with_retry_after
from gateway.upstream.server import Server
from gateway.upstream.transport_error import TransportError

MAX_EMBEDDINGS = 48 * 1024 * 1024
"""Bytes of an answer: 2,048 texts with 1,024 numbers each, in the longest form that an engine
writes."""


class EmbeddingRelay(Relay):
    """One request for embeddings, in a lane of its own: it does not delay chats, nor they it."""

    workload = EMBEDDINGS
    text_field = "input"
    _request: EmbeddingRequest
    _form: EmbeddingForm

    __slots__ = ("_embedding",)

    def __init__(self, context: RelayContext, client: ClientConnection, request: EmbeddingRequest) -> None:
        self._embedding = request.embedding
        super().__init__(context, client, request, request.form, "embedding")

    async def __call__(self, held: HeldBody) -> None:
        if self._embedding.texts:
            await super().__call__(held)
        else:
            self._answer_json(await in_turns(self._form.answer([], 0, self._timings)))
            self._record(None)

    def _text_length(self) -> int:
        return max(map(len, self._embedding.texts))

    async def _exchange(self, server: Server) -> None:
        embedder = self._backend.embedder
        model = self._destination.route.model
        body: bytes | list[bytes]
        if self._request.size > YIELD_BYTES:
            body = await in_turns(render_texts(self._embedding, lambda short: embedder.render(short, model)))
        else:
            body = embedder.render(self._embedding, model)
        head = server.embedding_head(self._request.came_through, self._context.gateway_id)
        asking = server.pool.request(head, body, self._count_stale)
        del body
        with await asking as response:
            if response.status != 200:
                raise with_retry_after(
                    embedder.client_error(response.status, await response.read(MAX_REFUSAL)), response
                )
            check_headers(response)
            try:
                answer = await response.read(MAX_EMBEDDINGS)
            except TransportError as fault:
                if fault.fault != "too_large":
                    raise
                raise InvalidRequest(
                    "The embeddings of these texts are too large for one answer. Send fewer texts in one request.",
                    param="input",
                ) from fault
        self._note_first_token()
        self._meter.end_upstream()
        await self._answer(await in_turns(embedder.parse(answer)))

    async def _answer(self, embedded: Embedded | None) -> None:
        if embedded is None or len(embedded.vectors) != len(self._embedding.texts):
            raise _malformed()
        wanted, found = self._embedding.dimensions, width(embedded.vectors[0])
        if wanted is not None and found != wanted:  # Ollama answers with the dimensions that the model has
            raise InvalidRequest(f"This model's embeddings have {found} dimensions.", param="dimensions")
        vectors = await self._converted(embedded.vectors)
        self._meter.usage = Usage(embedded.prompt_tokens, 0)
        self._answer_json(await in_turns(self._form.answer(vectors, embedded.prompt_tokens, self._timings)))

    async def _converted(self, vectors: list[EncodedVector]) -> list[EncodedVector]:
        """Encode the vectors as the client asked, and yield to the event loop in between."""
        done, size = [], 0
        try:
            for vector in vectors:
                done.append(converted(vector, self._embedding.in_base64))
                size += len(vector)
                if size > YIELD_BYTES:
                    size = 0
                    await asyncio.sleep(0)
        except ValueError:
            raise _malformed() from None
        return done


def _malformed() -> UpstreamError:
    return UpstreamError("malformed", "The model backend returned an invalid response.")
