"""The hot endpoints as raw ASGI: identify, parse, route, then hand over to a `Relay`."""

import asyncio
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from msgspec import Struct

from gateway.auth import Caller, Keys
from gateway.backends.backend import VIA
from gateway.config import Tier
from gateway.conversation import bucket_of
from gateway.cors import Cors
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
from gateway.metering import CHAT, NONE, Exchange
from gateway.params import TierParams
from gateway.parsing import check, check_json, check_text, decode
from gateway.protocol import LARGE_SCHEMAS, Chat
from gateway.relay import JSON_LINES, LARGE, Relay
from gateway.rollout import BUCKETS, Rollout
from gateway.routing import Route, Routing
from gateway.surroundings import Client, Request, Surroundings
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

CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")

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


class ChatEndpoint:
    """`POST /v1/chat/completions`."""

    def __init__(self, shared: Surroundings, keys: Keys, routing: Routing, rollout: Rollout, cors: Cors, images: Images) -> None:
        self._shared = shared
        self._keys = keys
        self._routing = routing
        self._lines = rollout.lines
        self._session_header = (shared.settings.session_header or "").encode()
        self._cors = cors
        self._images = images
        self._user_header = (shared.settings.user_header or "").encode()
        self._plain_claims: dict[str, Claim] = {}
        self._are_claims_special = bool(self._user_header) or routing.has_batch
        """The settings make a difference between requests of one key."""
        self._params = {tier.name: params for tier in shared.settings.tiers.values() if (params := _tier_params(tier))}
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
            size, max_text_body = len(body), self._shared.max_text_body
            text_size = check_text(body, max_text_body)
            chat = decode(body, max_text_body)
            del body
            stream = bool(chat.stream)
            if text_size > LARGE_SCHEMAS and chat.has_schemas:
                with Watch(client, self._shared.loop):
                    await self._shared.in_thread(check, chat)
            else:
                check(chat)
            tier = self._routing.tier(chat.model).name
            asked = chat if (params := self._params.get(tier)) is None else params.apply(chat)
            if chat.has_images:
                with Watch(client, self._shared.loop):
                    asked = await self._images.checked(asked)
            # Nothing waits from here on: once the roll-out has changed, no request begins on the side that was left.
            request = self._request(request_id, caller, asked, self._route(tier, chat, caller, terms), size, terms, fields)
        except GatewayError as error:
            self._refuse(client, fields, request_id, caller, error, stream, time.perf_counter() - arrived)
            return
        await Relay(self._shared, client, request)()

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

    def _route(self, tier: str, chat: Chat, caller: Caller, terms: Terms) -> Route:
        line = self._lines[tier]
        return line.route if line.canary is None else line.choose(bucket_of(caller.key_id, terms.session, chat, BUCKETS))

    def _request(self, request_id: str, caller: Caller, chat: Chat, route: Route, size: int, terms: Terms, fields: Fields) -> Request:
        return Request(
            request_id,
            "chatcmpl-" + _random_id(),
            caller.key_id,
            self._claim(caller, chat.model, fields),
            chat,
            size,
            route,
            terms.came_through,
            terms.read_timeout,
            int(time.time()),
            terms.extra_lines,
        )

    def _claim(self, caller: Caller, model: str, fields: Fields) -> Claim:
        """What the request asks of the line. Most ask for nothing: those of a key share one claim."""
        if not (self._are_claims_special or PRIORITY in fields or TIMEOUT in fields):
            return self._plain_claims.get(caller.key_id) or self._plain_claims.setdefault(caller.key_id, Claim(caller.key_id))
        person, priority, timeout = fields.get(self._user_header, b""), fields.get(PRIORITY), fields.get(TIMEOUT)
        is_batch = self._routing.is_batch(model) or (priority is not None and priority_is_batch(priority))
        return Claim(caller.key_id, person.decode("latin-1"), is_batch, None if timeout is None else timeout_of(timeout))

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
                endpoint=CHAT,
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
