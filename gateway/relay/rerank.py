"""The relay of one rerank request."""

import asyncio

from gateway.chat.answer import Usage
from gateway.dialects.rerank import RerankForm
from gateway.engines.engine import MAX_REFUSAL
from gateway.engines.rerank import VllmReranker
from gateway.errors import UpstreamError
from gateway.relay.base import Relay
from gateway.relay.context import RelayContext
from gateway.relay.requests import ClientConnection, RerankRequest
from gateway.relay.turns import YIELD_BYTES, in_turns
from gateway.telemetry.exchange import RERANK
from gateway.upstream.failures import check_headers, with_retry_after
from gateway.upstream.server import Server

ANSWER_GROWTH, MIN_ANSWER = 6, 1024 * 1024
"""Bytes of an answer: it repeats the documents, in which a byte may become six, and has the scores."""

_reranker = VllmReranker()


class RerankRelay(Relay):
    """One rerank request, in the lane of embeddings: both compute a prompt and generate nothing."""

    workload = RERANK
    text_field = "documents"
    _request: RerankRequest
    _form: RerankForm

    __slots__ = ()

    def __init__(self, context: RelayContext, client: ClientConnection, request: RerankRequest) -> None:
        super().__init__(context, client, request, request.form, "embedding")

    def _text_length(self) -> int:
        rerank = self._request.rerank
        return 0 if rerank.is_truncated else len(rerank.query) + max(map(len, rerank.documents))

    async def _exchange(self, server: Server) -> None:
        rerank, size = self._request.rerank, self._request.size
        body = _reranker.render(rerank, self._destination.route.model)
        if size > YIELD_BYTES:
            await asyncio.sleep(0)
        head = server.head_of(_reranker.path, self._request.came_through, self._context.gateway_id)
        with await server.pool.request(head, body, self._count_stale) as response:
            if response.status != 200:
                raise with_retry_after(
                    _reranker.client_error(response.status, await response.read(MAX_REFUSAL)), response
                )
            check_headers(response)
            answer = await response.read(ANSWER_GROWTH * size + MIN_ANSWER)
        self._note_first_token()
        self._meter.end_upstream()
        if size > YIELD_BYTES:
            await asyncio.sleep(0)
        ranked = _reranker.parse(answer, rerank)
        if ranked is None:
            raise UpstreamError("malformed", "The model backend returned an invalid response.")
        self._meter.usage = Usage(ranked.prompt_tokens, 0)
        rendering = self._form.answer(self._request.answer_id, ranked.results, ranked.prompt_tokens)
        self._answer_json(await in_turns(rendering))
