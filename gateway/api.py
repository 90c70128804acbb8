"""The hot endpoints as raw ASGI: identify, parse, route, then hand over to a `Relay`."""

import asyncio
import math
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from msgspec import Struct, structs

from gateway.auth import Caller, Keys
from gateway.auto import TASK, Auto
from gateway.backends.backend import VIA
from gateway.chat_relay import ChatRelay
from gateway.config import Settings, Tier
from gateway.conversation import bucket_of
from gateway.cors import Cors
from gateway.embedding import Embedding, parse_embedding
from gateway.embedding_relay import EmbeddingRelay
from gateway.errors import (
    ClientLeft,
    GatewayError,
    InvalidRequest,
    LoopDetected,
    MethodNotAllowed,
    RequestTooLarge,
    ShuttingDown,
)
from gateway.images import Images
from gateway.metering import CHAT, EMBEDDINGS, NONE, Exchange
from gateway.params import TierParams
from gateway.parsing import check, check_json, check_text, decode
from gateway.protocol import LARGE_SCHEMAS, Chat
from gateway.relay import JSON_LINES, LARGE, Relay
from gateway.rollout import BUCKETS, Rollout
from gateway.routing import Route, Routing
from gateway.surroundings import ChatRequest, Client, EmbeddingRequest, Surroundings
from gateway.turns import Claim
from gateway.watch import Watch

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Fields = Mapping[bytes, bytes]

PRIORITY = b"x-gateway-priority"
TIMEOUT = b"x-gateway-timeout"
MAX_TIMEOUT = 86400.0
SESSION = b"x-gateway-session"
TASK_FIELD = TASK.encode()

CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
EMBEDDING_PATHS = ("/v1/embeddings", "/embeddings")

_random_bits = random.getrandbits
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Terms(Struct, frozen=True, gc=False):
    """What the head of a request says beside who sent it: the same for all requests with this head."""

    came_through: bytes
    read_timeout: float | None
    """How long the client waits for a plain answer, where it says so."""
    extra_lines: bytes
    """Header lines sent with the answer, whatever it is."""
    session: bytes
    """The client's name for the conversation; empty without one."""


class Head(Struct, frozen=True, gc=False):
    """What is known of a request beside what it asks for."""

    request_id: str
    key_id: str
    size: int
    """Bytes of the body."""
    terms: Terms
    fields: Fields


Asked = TypeVar("Asked")


class Endpoint(ABC, Generic[Asked]):
    """One of OpenAI's endpoints: what is the same for all. `Asked` is its parsed body."""

    name: ClassVar[str]
    """Its label in the metrics."""

    def __init__(self, shared: Surroundings, keys: Keys, routing: Routing, cors: Cors) -> None:
        self._shared = shared
        self._keys = keys
        self._routing = routing
        self._session_header = (shared.settings.session_header or "").encode()
        self._cors = cors
        self._user_header = (shared.settings.user_header or "").encode()
        self._plain_claims: dict[str, Claim] = {}
        self._are_claims_special = bool(self._user_header) or routing.has_batch
        """The settings make a difference between requests of one key."""
        self.is_stopping = False
        """Refuse what is new: the gateway is on its way out."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope["extensions"]["gateway.client"]
        fields: Fields = client.fields
        arrived = time.perf_counter()
        request_id = request_id_of(fields)
        caller: Caller | None = None
        stream = False
        try:
            caller = client.notes.get("caller") or self._identify(scope, client, fields)
            if self.is_stopping:
                raise ShuttingDown
            terms = client.notes.get("terms") or self._terms(client, fields)
            body = client.whole_body()
            if body is None:
                body = await self._read(client, fields, receive)
            elif len(body) > self._shared.settings.max_body:
                raise self._too_large()
            if len(body) > LARGE:  # each step on 10 MB takes its milliseconds: others get their turn in between
                await asyncio.sleep(0)
            size = len(body)
            asked, text_size = self._parse(body)
            del body
            stream = self._is_stream(asked)
            relay = await self._relay(client, asked, text_size, Head(request_id, caller.key_id, size, terms, fields))
        except GatewayError as error:
            self._refuse(client, fields, request_id, caller, error, stream, time.perf_counter() - arrived)
            return
        await relay()

    def change(self, routing: Routing) -> None:
        """The settings have changed, and `shared` has them: go on with these, and with other names."""
        self._routing = routing
        self._are_claims_special = bool(self._user_header) or routing.has_batch

    @abstractmethod
    def _parse(self, body: bytes) -> tuple[Asked, int]:
        """What is asked for, and how many bytes of the body are text. Raises `GatewayError` for what cannot be served."""

    def _is_stream(self, asked: Asked) -> bool:
        return False

    @abstractmethod
    async def _relay(self, client: Client, asked: Asked, text_size: int, head: Head) -> Relay:
        """Who carries it out. Raises `GatewayError`."""

    def _identify(self, scope: Scope, client: Client, fields: Fields) -> Caller:
        refuse_loop(fields, self._shared.gateway_id)
        if scope["method"] != "POST":
            raise MethodNotAllowed("POST")
        caller = client.notes["caller"] = self._keys.identify(scope["headers"], fields)
        return caller

    def _terms(self, client: Client, fields: Fields) -> Terms:
        check_json(fields)
        read_timeout = _seconds(fields.get(b"x-stainless-read-timeout"))
        session = fields.get(SESSION) or fields.get(self._session_header, b"")
        terms = client.notes["terms"] = Terms(fields.get(VIA, b""), read_timeout, self._cors.header_lines(fields), session)
        return terms

    def _claim(self, key_id: str, fields: Fields, model: str | None = None) -> Claim:
        """What the request asks of the line. Most ask for nothing: those of a key share one claim. The name `model` may be one of low priority."""
        if not (self._are_claims_special or PRIORITY in fields or TIMEOUT in fields):
            return self._plain_claims.get(key_id) or self._plain_claims.setdefault(key_id, Claim(key_id))
        person, priority, timeout = fields.get(self._user_header, b""), fields.get(PRIORITY), fields.get(TIMEOUT)
        is_batch = (model is not None and self._routing.is_batch(model)) or (priority is not None and priority_is_batch(priority))
        return Claim(key_id, person.decode("latin-1"), is_batch, None if timeout is None else timeout_of(timeout))

    async def _read(self, client: Client, fields: Fields, receive: Receive) -> bytes:
        """The request's body.

        Raises:
            RequestTooLarge: more than `max_body` bytes, by its own word or in fact.
            ClientLeft: it did not come whole.
        """
        limit = self._shared.settings.max_body
        length = fields.get(b"content-length")
        if length is not None and int(length) > limit:
            raise self._too_large()
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientLeft
            piece: bytes = message["body"]
            size += len(piece)
            if size > limit:
                raise self._too_large()
            if not message["more_body"]:
                return b"".join((*pieces, piece)) if pieces else piece
            pieces.append(piece)

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(f"A request may have at most {self._shared.settings.max_body} bytes.")

    def _refuse(
        self, client: Client, fields: Fields, request_id: str, caller: Caller | None, error: GatewayError, stream: bool, seconds: float
    ) -> None:
        if not client.gone:
            lines = b"%b%bx-request-id: %b\r\n%b" % (JSON_LINES, self._cors.header_lines(fields), request_id.encode(), error.header_lines())
            client.answer(error.status, lines, error.envelope())
        self._shared.on_exchange(
            Exchange(
                request_id=request_id,
                key_id=caller.key_id if caller else "",
                endpoint=self.name,
                tier=NONE,
                backend=NONE,
                model=NONE,
                lane=NONE,
                stream=stream,
                status=error.status,
                code=error.code,
                reason=None,
                outcome=error.outcome,
                phase="queued",
                duration=round(seconds, 6),
                queue_wait=None,
                upstream=0.0,
                time_to_first_token=None,
                usage=None,
                attempts=0,
            )
        )


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


class EmbeddingEndpoint(Endpoint[Embedding]):
    """`POST /v1/embeddings`."""

    name = EMBEDDINGS

    def _parse(self, body: bytes) -> tuple[Embedding, int]:
        return parse_embedding(body, self._shared.max_text_body), len(body)

    async def _relay(self, client: Client, asked: Embedding, text_size: int, head: Head) -> EmbeddingRelay:
        route = self._routing.choose_embedding(asked.model)
        terms, claim = head.terms, self._claim(head.key_id, head.fields)
        lines = terms.came_through, terms.read_timeout, terms.extra_lines
        return EmbeddingRelay(self._shared, client, EmbeddingRequest(head.request_id, head.key_id, claim, head.size, route, *lines, asked))


def _with_line(head: Head, line: bytes) -> Head:
    """`head`, with one more line for the answer."""
    return structs.replace(head, terms=structs.replace(head.terms, extra_lines=head.terms.extra_lines + line))


def _tier_params(tier: Tier) -> TierParams:
    return TierParams(tier.params.default, tier.params.force, tier.params.drop, tier.max_tokens)


def request_id_of(fields: Fields) -> str:
    """The client's own `X-Request-Id` if it is short and plain, else a new one."""
    given = fields.get(b"x-request-id")
    if given is not None and _SANE_ID.fullmatch(given):
        return given.decode()
    return "req-" + _random_id()


def _random_id() -> str:
    return _random_bits(96).to_bytes(12).hex()  # a third of what formatting costs


def refuse_loop(fields: Fields, gateway_id: bytes) -> None:
    """Raises `LoopDetected` for a request that this very gateway has sent."""
    via = fields.get(VIA)
    if via is not None and gateway_id in via:
        raise LoopDetected


def priority_is_batch(value: bytes) -> bool:
    """Raises `InvalidRequest` for what is no priority."""
    word = value.strip().lower()
    if word not in (b"interactive", b"batch"):
        raise InvalidRequest("The header x-gateway-priority has to be 'interactive' or 'batch'.", param=PRIORITY.decode())
    return word == b"batch"


def timeout_of(value: bytes) -> float:
    """Raises `InvalidRequest` for what is no number of seconds."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:
        raise InvalidRequest("The header x-gateway-timeout has to be a number of seconds, more than 0 and at most 86400.", param=TIMEOUT.decode())
    return seconds


def _seconds(value: bytes | None) -> float | None:
    """A header's number of seconds; None for what is none, or out of reason."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 1 <= seconds <= 86400 else None
