"""Endpoints for embeddings: one class, whatever the client API."""

import asyncio

from gateway.api.endpoint import Endpoint, EndpointParts, RequestContext
from gateway.body_memory import HeldBody
from gateway.dialects.dialect import EmbeddingCall, EmbeddingDialect
from gateway.dialects.json_body import Steps
from gateway.relay.embeddings import EmbeddingRelay
from gateway.relay.requests import ClientConnection, EmbeddingRequest


class EmbeddingEndpoint(Endpoint[EmbeddingCall]):
    """Endpoint of one client API for embeddings."""

    def __init__(self, dialect: EmbeddingDialect, parts: EndpointParts) -> None:
        super().__init__(dialect, parts)
        self._dialect = dialect
        self._parsing = asyncio.Lock()

    def _parse(self, body: bytes) -> tuple[EmbeddingCall, int]:
        call = self._dialect.parse(body, self._context.max_text_body, self._model_names.choose_embedding)
        return call, len(body)

    async def _parse_long(self, body: bytes, held: HeldBody) -> tuple[EmbeddingCall, int]:
        """Parse one long body at a time: meanwhile, its texts are in memory twice."""
        async with self._parsing:
            return await super()._parse_long(body, held)

    def _parse_steps(self, body: bytes) -> Steps[tuple[EmbeddingCall, int]]:
        call = yield from self._dialect.parse_steps(body, self._model_names.choose_embedding)
        return call, len(body)

    async def _relay(
        self, client: ClientConnection, call: EmbeddingCall, text_size: int, head: RequestContext
    ) -> EmbeddingRelay:
        embedding = call.embedding
        route = self._model_names.choose_embedding(embedding.model)
        if head.hold is not None:
            self._reserve(head.hold, route.tier, text_size)
        lines, claim = head.relay_terms, self._claim(head)
        return EmbeddingRelay(
            self._context,
            client,
            EmbeddingRequest(head.request_id, head.key_id, claim, head.size, route, *lines, embedding, call.form),
        )
