"""Endpoint for reranking."""

from gateway.api.endpoint import Endpoint, EndpointParts, RequestContext
from gateway.api.request_headers import random_id
from gateway.dialects.json_body import Steps
from gateway.dialects.rerank import CohereRerank, RerankCall
from gateway.relay.requests import ClientConnection, RerankRequest
from gateway.relay.rerank import RerankRelay


class RerankEndpoint(Endpoint[RerankCall]):
    """Endpoint for reranking."""

    def __init__(self, dialect: CohereRerank, parts: EndpointParts) -> None:
        super().__init__(dialect, parts)
        self._dialect = dialect

    def _parse(self, body: bytes) -> tuple[RerankCall, int]:
        return self._dialect.parse(body, self._model_names.choose_reranker), len(body)

    def _parse_steps(self, body: bytes) -> Steps[tuple[RerankCall, int]]:
        call = yield from self._dialect.parse_steps(body, self._model_names.choose_reranker)
        return call, len(body)

    async def _relay(
        self, client: ClientConnection, call: RerankCall, text_size: int, head: RequestContext
    ) -> RerankRelay:
        route = self._model_names.choose_reranker(call.rerank.model)
        if head.hold is not None:
            self._reserve(head.hold, route.tier, text_size)
        lines, claim = head.relay_terms, self._claim(head)
        request = RerankRequest(
            head.request_id, head.key_id, claim, head.size, route, *lines, call.rerank, call.form, random_id()
        )
        return RerankRelay(self._context, client, request)
