"""Embeddings endpoint."""

from gateway.api.endpoint import Endpoint, RequestContext
from gateway.chat.embedding import Embedding
from gateway.dialects.json_body import Steps
from gateway.dialects.openai_embeddings import parse_embedding, parse_long_embedding
from gateway.relay.embeddings import EmbeddingRelay
from gateway.relay.requests import ClientConnection, EmbeddingRequest
from gateway.telemetry.exchange import EMBEDDINGS


class EmbeddingEndpoint(Endpoint[Embedding]):
    """`POST /v1/embeddings`."""

    name = EMBEDDINGS

    def _parse(self, body: bytes) -> tuple[Embedding, int]:
        embedding = parse_embedding(body, self._context.max_text_body, self._model_names.choose_embedding)
        return embedding, len(body)

    def _parse_steps(self, body: bytes) -> Steps[tuple[Embedding, int]]:
        embedding = yield from parse_long_embedding(body, self._model_names.choose_embedding)
        return embedding, len(body)

    async def _relay(
        self, client: ClientConnection, asked: Embedding, text_size: int, head: RequestContext
    ) -> EmbeddingRelay:
        route = self._model_names.choose_embedding(asked.model)
        terms, claim = head.terms, self._claim(head.key_id, head.fields)
        lines = terms.came_through, terms.read_timeout, terms.extra_lines
        return EmbeddingRelay(
            self._context,
            client,
            EmbeddingRequest(head.request_id, head.key_id, claim, head.size, route, *lines, asked),
        )
