"""Data endpoints as raw ASGI: authenticate, parse, route, then hand over to a `Relay`."""

import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from msgspec import Struct

from gateway.admission.fair_queue import Claim
from gateway.api.auth import ApiKeys, Caller
from gateway.api.cors import Cors
from gateway.api.hosts import HostCheck
from gateway.api.model_names import ModelNames
from gateway.api.request_headers import (
    PRIORITY,
    SESSION,
    TIMEOUT,
    Fields,
    HeaderTerms,
    priority_is_batch,
    reject_loop,
    request_id_of,
    seconds_of,
    timeout_of,
)
from gateway.body_memory import HeldBody
from gateway.chat.surrogates import without_halves
from gateway.dialects.dialect import ErrorForm
from gateway.dialects.json_body import Steps, check_media_type
from gateway.errors import (
    ClientLeft,
    GatewayError,
    InvalidJson,
    MethodNotAllowed,
    ModelNotFound,
    RateLimited,
    RequestTooLarge,
    ShuttingDown,
    TierNotAllowed,
)
from gateway.keys.account import Account
from gateway.keys.hold import Hold
from gateway.relay.context import RelayContext
from gateway.relay.requests import ClientConnection
from gateway.relay.turns import YIELD_BYTES, in_turns
from gateway.telemetry.exchange import NONE, Attribution, Exchange
from gateway.telemetry.trace_context import current_trace
from gateway.upstream.server import VIA, came_through_lines

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Dialect(Protocol):
    """The part of a dialect that all endpoints need."""

    endpoint: str
    errors: ErrorForm
    needs_media_type: bool


class RequestingClient(ClientConnection, Protocol):
    """The client's side of an exchange whose request may not have arrived completely."""

    async def receive(self) -> Mapping[str, Any]: ...


RunningRelay = Callable[[HeldBody], Awaitable[None]]
"""Relay of a request: a call carries it out."""


class RequestContext(Struct, frozen=True, gc=False):
    """Metadata of a request: everything but its parsed body."""

    request_id: str
    key_id: str
    size: int
    """Size of the body in bytes."""
    terms: HeaderTerms
    fields: Fields
    held: HeldBody
    """Memory that the request holds until it runs."""
    hold: Hold | None
    """Hold on the limits of its key; None: the key has none."""

    @property
    def relay_terms(self) -> tuple[bytes, float | None, bytes, Hold | None]:
        """The last common fields of a `RelayRequest`: from `came_through` on."""
        terms, hold = self.terms, self.hold
        lines = terms.extra_lines if hold is None else terms.extra_lines + hold.lines
        return terms.came_through, terms.read_timeout, lines, hold


class EndpointParts(NamedTuple):
    """Parts that all data endpoints share."""

    context: RelayContext
    keys: ApiKeys
    model_names: ModelNames
    cors: Cors
    hosts: HostCheck


ParsedBody = TypeVar("ParsedBody")


class Endpoint(ABC, Generic[ParsedBody]):
    """Base of the data endpoints; `ParsedBody` is the type of the parsed request body."""

    def __init__(self, dialect: Dialect, parts: EndpointParts) -> None:
        self._name = dialect.endpoint
        self._errors = dialect.errors
        self._needs_media_type = dialect.needs_media_type
        self._context = context = parts.context
        self._keys = parts.keys
        self._model_names = model_names = parts.model_names
        self._session_header = (context.settings.session_header or "").encode()
        self._cors = parts.cors
        self._hosts = parts.hosts
        self._user_header = (context.settings.user_header or "").encode()
        self._plain_claims: dict[str, Claim] = {}
        self._are_claims_special = bool(self._user_header) or model_names.has_batch
        """True if the settings treat requests of one key differently (by person or priority)."""
        self.is_stopping = False
        """True while the gateway shuts down: new requests are refused."""

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Return what serves the request."""
        return self._serve(scope, scope["extensions"]["gateway.client"])

    async def _serve(self, scope: Scope, client: RequestingClient) -> None:
        fields = client.fields
        arrived = time.perf_counter()
        request_id = request_id_of(fields)
        caller: Caller | None = None
        asked: ParsedBody | None = None
        held = HeldBody(self._context.body_memory)
        hold: Hold | None = None
        try:
            try:
                caller = client.notes.get(self._keys.note) or self._identify(scope, client, fields)
                if self.is_stopping:
                    raise ShuttingDown
                terms = client.notes.get("terms") or self._terms(client, fields)
                held.key = caller.key_id
                account = caller.account
                if account is not None:
                    hold = await self._begin(account, fields)
                body = client.whole_body()
                if body is None:
                    body = await self._read(fields, client.receive, held)
                elif len(body) > self._context.settings.max_body:
                    raise self._too_large()
                head = RequestContext(request_id, caller.key_id, len(body), terms, fields, held, hold)
                is_long = len(body) > YIELD_BYTES
                try:
                    asked, text_size = await self._parse_long(body, held) if is_long else self._parse(body)
                except InvalidJson:
                    if (mended := without_halves(body)) is body:
                        raise
                    asked, text_size = await self._parse_long(mended, held) if is_long else self._parse(mended)
                    del mended
                del body  # whatever is parsed from it is a copy
                if hold is not None and hold.account.sharing is not None:
                    person, tokens = self._person_behind(hold.account, fields), self._tokens(hold, asked, text_size)
                    await hold.account.sharing.make_room(hold.account, person, 0, tokens)
                relay = await self._relay(client, asked, text_size, head)
                asked = None  # the relay may have another one, with converted images
            except GatewayError as error:
                if hold is not None:
                    error = self._without_hidden_names(error, hold)
                stream = asked is not None and self._is_stream(asked)
                self._refuse(client, fields, request_id, caller, hold, error, stream, time.perf_counter() - arrived)
                return
            await relay(held)
        finally:
            if held.size:
                held.release()
            if hold is not None:
                hold.end()

    def change(self, model_names: ModelNames) -> None:
        """Apply changed settings, which the context already holds, and the new `model_names`."""
        self._model_names = model_names
        self._are_claims_special = bool(self._user_header) or model_names.has_batch

    @abstractmethod
    def _parse(self, body: bytes) -> tuple[ParsedBody, int]:
        """Return the parsed body, and how many bytes of it are text.

        Raises:
            GatewayError: The request cannot be served.
        """

    async def _parse_long(self, body: bytes, held: HeldBody) -> tuple[ParsedBody, int]:
        """Parse a long body in steps of some milliseconds, between which others get a turn."""
        held.resize(len(body))
        return await in_turns(self._parse_steps(body))

    @abstractmethod
    def _parse_steps(self, body: bytes) -> Steps[tuple[ParsedBody, int]]:
        """Do the same as `_parse` in steps."""

    def _is_stream(self, asked: ParsedBody) -> bool:
        return False

    def _tokens(self, hold: Hold, asked: ParsedBody, text_size: int) -> int:
        """Return about how many tokens the request takes."""
        return hold.estimate(text_size, 0)

    @abstractmethod
    async def _relay(
        self, client: ClientConnection, asked: ParsedBody, text_size: int, head: RequestContext
    ) -> RunningRelay:
        """Return the relay that carries out the request.

        Raises:
            GatewayError: The request cannot be served.
        """

    def _identify(self, scope: Scope, client: ClientConnection, fields: Fields) -> Caller:
        """Check the head and return the caller, once for all requests of a connection with this head.

        The HTTP server gives the others to the `handler` in the notes, without an ASGI scope.
        """
        self._hosts.check(fields)
        reject_loop(fields, self._context.gateway_id)
        if scope["method"] != "POST":
            raise MethodNotAllowed("POST")
        client.notes.clear()  # of the caller under earlier keys: a connection may outlast many changes of them
        caller = client.notes[self._keys.note] = self._keys.identify(scope["headers"], fields, scope["server"])
        client.notes["handler"] = partial(self._serve, {**scope, "extensions": {}})
        return caller

    def _terms(self, client: ClientConnection, fields: Fields) -> HeaderTerms:
        if self._needs_media_type:
            check_media_type(fields)
        read_timeout = seconds_of(fields.get(b"x-stainless-read-timeout"))
        session = fields.get(SESSION) or fields.get(self._session_header, b"")
        via, trace = fields.get(VIA, b""), self._context.begin_trace(fields)
        lines = b""
        if via or trace is not None:
            lines = came_through_lines(via, self._context.gateway_id, b"" if trace is None else trace.header_lines)
        terms = HeaderTerms(lines, read_timeout, self._cors.header_lines(fields), session)
        if trace is None:
            client.notes["terms"] = terms
        else:  # the next request with this head has a trace, or a span, of its own
            current_trace.set(trace)
        return terms

    def _person(self, fields: Fields) -> str:
        """Return the person whom the header `user_header` names; empty if it names none."""
        return fields.get(self._user_header, b"").decode("latin-1")

    async def _begin(self, account: Account, fields: Fields) -> Hold:
        """Admit a request of a key, with a quota where replicas share its limits.

        Raises:
            ExpiredApiKey: The key has expired.
            RateLimited: A limit of requests or of concurrency is reached.
        """
        person = self._person_behind(account, fields)
        if account.sharing is not None:
            await account.sharing.make_room(account, person, 1, 0)
        return account.begin(person)

    def _person_behind(self, account: Account, fields: Fields) -> str:
        """Return the person whose limits count; empty if the key does not tell persons apart."""
        return "" if account.policy.per_person is None else self._person(fields)

    def _claim(self, head: RequestContext, model: str | None = None) -> Claim:
        """Return what the request asks of the queue.

        Most requests ask for nothing special: those of a key share one claim. `model` is the name
        in the request, which may be an alias with batch priority. A key with batch priority cannot
        ask for more.
        """
        key_id, fields = head.key_id, head.fields
        must_be_batch = head.hold is not None and head.hold.is_batch
        if not (self._are_claims_special or must_be_batch or PRIORITY in fields or TIMEOUT in fields):
            return self._plain_claims.get(key_id) or self._plain_claims.setdefault(key_id, Claim(key_id))
        priority, timeout = fields.get(PRIORITY), fields.get(TIMEOUT)
        is_batch = (model is not None and self._model_names.is_batch(model)) or (
            priority is not None and priority_is_batch(priority)
        )
        return Claim(
            key_id, self._person(fields), is_batch or must_be_batch, None if timeout is None else timeout_of(timeout)
        )

    async def _read(self, fields: Fields, receive: Receive, held: HeldBody) -> bytes:
        """Read the request body. `held` counts its bytes as they arrive.

        Nothing is allocated for bytes that have not arrived, and no piece is kept beside its copy.

        Raises:
            RequestTooLarge: The announced or the actual size exceeds `max_body` bytes.
            QueueFull: There is no memory for the announced or the actual size.
            ClientLeft: The client disconnected before the body was complete.
        """
        limit = self._context.settings.max_body
        length = fields.get(b"content-length")
        if length is not None:
            if int(length) > limit:
                raise self._too_large()
            held.check(int(length))
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientLeft
            piece: bytes = message["body"]
            if len(body) + len(piece) > limit:
                raise self._too_large()
            held.grow(len(piece))
            if not (message["more_body"] or body):
                return piece
            body += piece
            if not message["more_body"]:
                return bytes(body)  # two copies, but only for the moment until this one is freed
            del message, piece

    def _id_line(self, request_id: str) -> bytes:
        """Return the header line with the request's id that the client API has besides the gateway's."""
        name = self._errors.id_header
        return b"%b: %b\r\n" % (name, request_id.encode()) if name else b""

    def _reserve(self, hold: Hold, name: str, size: int) -> None:
        """Reserve the tokens of a request that only the model `name` can serve and that generates none.

        `size` is that of its text in bytes.

        Raises:
            TierNotAllowed: The key may not use the model.
            RateLimited: The key's tokens are used up.
        """
        self._check_allowed(hold, name)
        hold.reserve(name, size, 0, has_tiers=False)

    def _check_allowed(self, hold: Hold, name: str) -> None:
        """Check that the key may use a tier, an embedding model or a reranker, by its name in the settings.

        Raises:
            TierNotAllowed: It may not.
        """
        if not hold.account.allows(name):
            raise TierNotAllowed(", ".join(f"'{known}'" for known in self._model_names.names_for(hold.account.allows)))

    def _without_hidden_names(self, error: GatewayError, hold: Hold) -> GatewayError:
        """Return `error`; one that lists the models lists those that the key may use."""
        if not isinstance(error, ModelNotFound) or hold.account.tiers is None:
            return error
        names = ", ".join(f"'{name}'" for name in self._model_names.names_for(hold.account.allows)) or "none"
        return ModelNotFound(
            f"The requested model does not exist. This API key may use: {names}.", param="model", model=error.model
        )

    def _limit_lines(self, account: Account, hold: Hold | None, fields: Fields) -> bytes:
        """Return the header lines about the key's limits, for an error."""
        if hold is not None and hold.lines:
            return hold.lines
        return account.lines(self._person(fields))

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(f"The request body may have at most {self._context.settings.max_body} bytes.")

    def _refuse(
        self,
        client: ClientConnection,
        fields: Fields,
        request_id: str,
        caller: Caller | None,
        hold: Hold | None,
        error: GatewayError,
        stream: bool,
        seconds: float,
    ) -> None:
        account = None if caller is None else caller.account
        if not client.gone:
            lines = b"%b%b%bx-request-id: %b\r\n%b" % (
                self._errors.json_lines,
                self._cors.header_lines(fields),
                b"" if account is None else self._limit_lines(account, hold, fields),
                request_id.encode(),
                self._id_line(request_id) + self._errors.error_lines(error),
            )
            client.answer(self._errors.error_status(error), lines, self._errors.error_body(error))
        if isinstance(error, RateLimited) and account is not None:
            self._context.metrics.keys.refuse(account.name, error.limit)
        record = self._context.on_exchange
        if (trace := current_trace.get() or self._context.begin_trace(fields)) is not None:
            record = trace.recorder(record, None)
        record(
            Exchange(
                request_id=request_id,
                key_id=caller.key_id if caller else "",
                key=account.name if account else "",
                endpoint=self._name,
                tier=NONE,
                backend=NONE,
                model=NONE,
                lane=NONE,
                stream=stream,
                status=self._errors.error_status(error),
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
            ),
            self._attribution(account, fields),
        )

    def _attribution(self, account: Account | None, fields: Fields) -> Attribution | None:
        """Return who asked, if the key may name persons and names one."""
        person = self._person(fields)
        return Attribution(person) if person and (account is None or account.policy.is_trusted) else None
