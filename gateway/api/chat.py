"""Endpoints for chats: one class, whatever the client API."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

from msgspec import structs

from gateway.api.auto import TASK, AutoRules
from gateway.api.endpoint import Endpoint, EndpointParts, RequestContext
from gateway.api.model_names import ModelNames
from gateway.api.request_headers import random_id
from gateway.body_memory import weight
from gateway.chat.checks import check, check_in_steps, needs_steps
from gateway.chat.completion import Completion
from gateway.chat.image_address import parse_prefix
from gateway.chat.images import ImageNormalizer, rename_place
from gateway.chat.parameter_policy import ParameterPolicy
from gateway.chat.request import LARGE_SCHEMAS, Chat
from gateway.config import Settings, Tier
from gateway.dialects.dialect import ChatCall, ChatDialect, ChatForm, ChoiceForm, ChoicesForm
from gateway.dialects.json_body import Steps
from gateway.dialects.openai_chat import CompletionForm, with_reasoning_field
from gateway.dialects.openai_completions import TextForm
from gateway.errors import BackendUnavailable, InvalidRequest
from gateway.keys.hold import Hold
from gateway.relay.cancel_scope import CancelScope
from gateway.relay.chat import ChatRelay
from gateway.relay.choices import ChoiceConnection, ChoicesRelay, chats_of
from gateway.relay.completions import CompletionRelay
from gateway.relay.discovery import DiscoveredModel
from gateway.relay.load import LoadRelay, UnloadRelay
from gateway.relay.requests import ChatRequest, ClientConnection
from gateway.relay.route import Route
from gateway.rollout.assignment import BUCKETS
from gateway.rollout.canary import canary_bucket
from gateway.rollout.state import Rollout
from gateway.telemetry.exchange import NONE
from gateway.upstream.image_fetcher import ImageFetcher

TASK_FIELD = TASK.encode()


MAX_ANSWERS = 128
"""Answers for which a request asks a quota before it has been checked."""


class ChatParts(NamedTuple):
    """Parts that the endpoints for chats share in addition."""

    rollout: Rollout
    images: ImageNormalizer
    fetcher: ImageFetcher


class ChatEndpoint(Endpoint[ChatCall]):
    """Endpoint of one client API for chats."""

    relay_class: ClassVar[type[ChatRelay]] = ChatRelay

    def __init__(self, dialect: ChatDialect, parts: EndpointParts, chat_parts: ChatParts) -> None:
        super().__init__(dialect, parts)
        self._dialect = dialect
        self._tier_routes = chat_parts.rollout.tiers
        self._images = chat_parts.images
        self._fetcher = chat_parts.fetcher
        self._apply(parts.context.settings)

    def _apply(self, settings: Settings) -> None:
        self._auto = AutoRules(settings)
        allowed = settings.image_urls.allow if settings.image_urls else ()
        self._fetcher.allow = [prefix for text in allowed if (prefix := parse_prefix(text))]
        self._max_pixels = {tier.name: tier.images.max_pixels or 0 for tier in settings.tiers.values()}
        self._params = {tier.name: params for tier in settings.tiers.values() if (params := _tier_params(tier))}
        self._max_tokens = {tier.name: tier.max_tokens for tier in settings.tiers.values()}
        self._reasoning_fields = {
            tier.name: tier.reasoning_field for tier in settings.tiers.values() if tier.reasoning_field != "reasoning"
        }

    def change(self, model_names: ModelNames) -> None:
        super().change(model_names)
        self._apply(self._context.settings)

    def _parse(self, body: bytes) -> tuple[ChatCall, int]:
        return self._dialect.parse(body, self._context.max_text_body)

    def _parse_steps(self, body: bytes) -> Steps[tuple[ChatCall, int]]:
        return self._dialect.parse_steps(body, self._context.max_text_body)

    def _is_stream(self, asked: ChatCall) -> bool:
        return asked.form.is_stream

    async def _relay(
        self, client: ClientConnection, call: ChatCall, text_size: int, head: RequestContext
    ) -> ChatRelay | ChoicesRelay:
        asked = call.chat
        if text_size > LARGE_SCHEMAS and needs_steps(asked):
            for _ in check_in_steps(asked):
                await asyncio.sleep(0)
        else:
            check(asked)
        model_names, original_head = self._model_names, head
        named = model_names.tier(asked.model)
        pinned: Route | None = None
        if isinstance(named, Tier):
            tier = named.name
        else:
            tier, pinned, head = self._chosen(named, asked, head)
        if head.hold is not None:
            tier, pinned = self._reserve_tokens(head.hold, asked, tier, pinned, text_size)
        chat = asked if (params := self._params.get(tier)) is None else params.apply(asked)
        bucket: int | None = None
        if not chat.has_plain_messages and chat.has_images:
            head.held.resize(weight(head.size, chat))
            checked = await self._checked(client, chat, call.image_paths, tier, head)
            if self._model_names is not model_names:
                # The settings changed in the meantime, and may no longer have this tier or model.
                return await self._relay(client, call, text_size, original_head)
            if checked is not chat:  # converted images no longer identify the conversation
                chat, bucket = checked, canary_bucket(head.key_id, head.terms.session, asked, BUCKETS)
        form = call.form
        if tier in self._reasoning_fields:
            form = with_reasoning_field(form, self._reasoning_fields[tier])
        is_several = (chat.n is not None and chat.n > 1) or (len(chat.messages) > 1 and isinstance(chat, Completion))
        if is_several and isinstance(form, CompletionForm | TextForm):  # other APIs have no choices
            return self._choices(client, chat, form, lambda: pinned or self._route(tier, asked, head), head, bucket)
        # No await from here on: after a roll-out change no request begins on the previous backend.
        route = pinned or self._route(tier, asked, head)
        request = self._request(chat, form, route, head, bucket)
        if call.names_stop or self._errors.id_header:
            lines = request.extra_lines + self._id_line(head.request_id)
            request = structs.replace(request, names_stop=call.names_stop, extra_lines=lines)
        if call.action != "chat":
            return (LoadRelay if call.action == "load" else UnloadRelay)(self._context, client, request)
        return self.relay_class(self._context, client, request)

    async def _checked(
        self, client: ClientConnection, chat: Chat, paths: Sequence[str], tier: str, head: RequestContext
    ) -> Chat:
        """Return `chat` with images that every engine accepts, or `chat` itself if they all are.

        Raises:
            InvalidRequest: One of the images. The error names its path in the client's request.
            QueueTimeout, QueueFull: See the fetcher and the normaliser.
        """
        with CancelScope(client, self._context.loop):
            max_body, on_size = self._context.settings.max_body, head.held.grow
            try:
                fetched = await self._fetcher.fetched(chat, head.key_id, max_body, on_size)
                return await self._images.checked(fetched, head.key_id, on_size, self._max_pixels.get(tier, 0))
            except InvalidRequest as error:
                rename_place(error, chat, paths)
                raise

    def _chosen(
        self, found: DiscoveredModel | None, asked: Chat, head: RequestContext
    ) -> tuple[str, Route | None, RequestContext]:
        """Return the tier for `auto`, and `head` with the reason; or the route of the discovered model, without a tier.

        For `auto`, a key that may not use the tier of the rules gets the first one that it may use.

        Raises:
            InvalidRequest: The header with the task is invalid.
        """
        if found is not None:
            return NONE, found.route, head
        tier, reason = self._auto.choose(asked, head.fields.get(TASK_FIELD))
        if head.hold is not None and not head.hold.account.allows(tier):
            tier = next(filter(head.hold.account.allows, self._tier_routes), tier)
            reason += "; the key may not use its tier"
        return tier, None, _with_line(head, b"x-gateway-reason: %b\r\n" % reason.encode())

    def _choices(
        self,
        client: ClientConnection,
        chat: Chat,
        form: ChoicesForm,
        route: Callable[[], Route],
        head: RequestContext,
        bucket: int | None,
    ) -> ChoicesRelay:
        """Return the relay of several choices. Each gets its route when it begins."""
        answer_id, created, model_names = random_id(), int(time.time()), self._model_names

        def make(connection: ChoiceConnection, chat: Chat, choice: ChoiceForm) -> ChatRelay:
            if self._model_names is not model_names:  # the settings may no longer have the tier
                raise BackendUnavailable("The settings have just changed. Try again.", retry_after=1)
            request = self._request(chat, choice, route(), head, bucket)
            request = structs.replace(request, answer_id=answer_id, created=created)
            return self.relay_class(self._context, connection, request)

        return ChoicesRelay(client, chats_of(chat), form, answer_id, created, make, head.hold)

    def _route(self, tier: str, chat: Chat, head: RequestContext) -> Route:
        tier_route = self._tier_routes[tier]
        return (
            tier_route.route
            if tier_route.canary is None
            else tier_route.choose(canary_bucket(head.key_id, head.terms.session, chat, BUCKETS))
        )

    def _request(
        self, chat: Chat, form: ChatForm, route: Route, head: RequestContext, bucket: int | None
    ) -> ChatRequest:
        terms, hold = head.terms, head.hold
        return ChatRequest(
            head.request_id,
            head.key_id,
            self._claim(head, chat.model),
            head.size,
            route,
            terms.came_through,
            terms.read_timeout,
            terms.extra_lines if hold is None else terms.extra_lines + hold.lines,
            hold,
            chat,
            form,
            random_id(),
            int(time.time()),
            terms.session,
            bucket,
        )

    def _reserve_tokens(
        self, hold: Hold, asked: Chat, tier: str, pinned: Route | None, text_size: int
    ) -> tuple[str, Route | None]:
        """Reserve the tokens of a request on its key's limits, and return what serves it.

        Raises:
            TierNotAllowed: The key may not use the tier.
            RateLimited: The key's tokens are used up.
        """
        name = tier if pinned is None else pinned.model
        self._check_allowed(hold, name)
        limit, most = asked.token_limit, self._max_tokens.get(tier)
        if most is not None and (limit is None or limit > most):
            limit = most
        images, answers = _sizes(asked)
        served = hold.reserve(name, text_size, limit, images=images, answers=answers)
        return (tier, pinned) if served == name else (served, None)

    def _tokens(self, hold: Hold, call: ChatCall, text_size: int) -> int:
        images, answers = _sizes(call.chat)
        return hold.estimate(text_size, call.chat.token_limit, images=images, answers=min(answers, MAX_ANSWERS))


class CompletionEndpoint(ChatEndpoint):
    """Endpoint for text completions."""

    relay_class = CompletionRelay


def _sizes(asked: Chat) -> tuple[int, int]:
    """Return how many images and answers a request has."""
    has_images = not asked.has_plain_messages and asked.has_images
    images = sum(len(message.images) for message in asked.messages) if has_images else 0
    is_several = isinstance(asked, Completion) and len(asked.messages) > 1
    return images, (asked.n or 1) * (len(asked.messages) if is_several else 1)


def _with_line(head: RequestContext, line: bytes) -> RequestContext:
    """Return `head` with one more header line for the response."""
    return structs.replace(head, terms=structs.replace(head.terms, extra_lines=head.terms.extra_lines + line))


def _tier_params(tier: Tier) -> ParameterPolicy:
    return ParameterPolicy(tier.params.default, tier.params.force, tier.params.drop, tier.max_tokens)
