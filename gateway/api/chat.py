"""The chat completions endpoint."""

import time

from msgspec import structs

from gateway.api.auth import Keys
from gateway.api.auto import TASK, Auto
from gateway.api.cors import Cors
from gateway.api.endpoint import Endpoint, Head
from gateway.api.model_names import Routing
from gateway.api.request_headers import _random_id
from gateway.chat.checks import check
from gateway.chat.images import Images
from gateway.chat.parameter_policy import TierParams
from gateway.chat.request import LARGE_SCHEMAS, Chat
from gateway.config import Settings, Tier
from gateway.dialects.openai_chat import check_text, decode
from gateway.relay.cancel_scope import Watch
from gateway.relay.chat import ChatRelay
from gateway.relay.context import Surroundings
from gateway.relay.requests import ChatRequest, Client
from gateway.relay.route import Route
from gateway.rollout.canary import bucket_of
from gateway.rollout.state import BUCKETS, Rollout
from gateway.telemetry.exchange import CHAT

TASK_FIELD = TASK.encode()

CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")


class ChatEndpoint(Endpoint[Chat]):
    """`POST /v1/chat/completions`."""

    name = CHAT

    def __init__(self, shared: Surroundings, keys: Keys, routing: Routing, rollout: Rollout, cors: Cors, images: Images) -> None:
        super().__init__(shared, keys, routing, cors)
        self._lines = rollout.lines
        self._images = images
        self._take(shared.settings)

    def _take(self, settings: Settings) -> None:
        self._auto = Auto(settings)
        self._params = {tier.name: params for tier in settings.tiers.values() if (params := _tier_params(tier))}

    def change(self, routing: Routing) -> None:
        super().change(routing)
        self._take(self._shared.settings)

    def _parse(self, body: bytes) -> tuple[Chat, int]:
        max_text_body = self._shared.max_text_body
        text_size = check_text(body, max_text_body)
        return decode(body, max_text_body), text_size

    def _is_stream(self, asked: Chat) -> bool:
        return bool(asked.stream)

    async def _relay(self, client: Client, asked: Chat, text_size: int, head: Head) -> ChatRelay:
        if text_size > LARGE_SCHEMAS and asked.has_schemas:
            with Watch(client, self._shared.loop):
                await self._shared.in_thread(check, asked)
        else:
            check(asked)
        routing, given = self._routing, head
        named = routing.tier(asked.model)
        if named is not None:
            tier = named.name
        else:
            tier, reason = self._auto.choose(asked, head.fields.get(TASK_FIELD))
            head = _with_line(head, b"x-gateway-reason: %b\r\n" % reason.encode())
        chat = asked if (params := self._params.get(tier)) is None else params.apply(asked)
        bucket: int | None = None
        if chat.has_images:
            with Watch(client, self._shared.loop):
                checked = await self._images.checked(chat)
            if self._routing is not routing:  # the settings have changed meanwhile, and what was found may be gone
                return await self._relay(client, asked, text_size, given)
            if checked is not chat:  # what was converted does not tell the conversation any more
                chat, bucket = checked, bucket_of(head.key_id, head.terms.session, asked, BUCKETS)
        # Nothing waits from here on: once the roll-out has changed, no request begins on the side that was left.
        return ChatRelay(self._shared, client, self._request(chat, self._route(tier, asked, head), head, bucket))

    def _route(self, tier: str, chat: Chat, head: Head) -> Route:
        line = self._lines[tier]
        return line.route if line.canary is None else line.choose(bucket_of(head.key_id, head.terms.session, chat, BUCKETS))

    def _request(self, chat: Chat, route: Route, head: Head, bucket: int | None) -> ChatRequest:
        terms = head.terms
        return ChatRequest(
            head.request_id,
            head.key_id,
            self._claim(head.key_id, head.fields, chat.model),
            head.size,
            route,
            terms.came_through,
            terms.read_timeout,
            terms.extra_lines,
            chat,
            "chatcmpl-" + _random_id(),
            int(time.time()),
            terms.session,
            bucket,
        )


def _with_line(head: Head, line: bytes) -> Head:
    """`head`, with one more line for the answer."""
    return structs.replace(head, terms=structs.replace(head.terms, extra_lines=head.terms.extra_lines + line))


def _tier_params(tier: Tier) -> TierParams:
    return TierParams(tier.params.default, tier.params.force, tier.params.drop, tier.max_tokens)
