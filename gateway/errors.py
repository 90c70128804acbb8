"""All errors that a client can get, as one tree of exceptions.

    GatewayError
    ├─ InvalidRequest 400
    │  ├─ InvalidJson, UnsupportedParameter, InvalidImage, InvalidImageUrl, SchemaTooComplex, RolesRefused
    │  └─ ContextLengthExceeded
    ├─ InvalidApiKey 401, ExpiredApiKey 401, Forbidden 403, TierNotAllowed 403
    ├─ RateLimited 429
    │  └─ BudgetSpent, ConcurrencyExceeded
    ├─ ModelNotFound 404, NotFound 404, MethodNotAllowed 405
    ├─ RequestTimeout 408, Conflict 409, RequestTooLarge 413
    ├─ UnsupportedMediaType 415, HeadersTooLarge 431
    ├─ ClientLeft 499            counted and logged, never sent
    ├─ Crash 500
    ├─ ModelUnloaded             never sent: the request is sent again
    ├─ UpstreamError 502
    ├─ Overloaded 503
    │  └─ QueueFull, QueueTimeout, BackendUnavailable, ShuttingDown
    ├─ UpstreamTimeout 504
    └─ LoopDetected 508

A message says what is wrong and what to do next. It never contains a host, a path, a prompt, a
completion or a key.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, TypeVar

import orjson

Outcome = Literal["ok", "client_error", "rejected", "upstream_error", "timeout", "cancelled"]
"""Result of an exchange; a label of `gateway_requests_total`."""

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"


class GatewayError(Exception):
    """An error answer: the HTTP status, and `type`, `code` and `param` of OpenAI's error object.

    `retry_after` is in whole seconds. `headers` are sent in addition to the common ones.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = SERVER_ERROR
    code: ClassVar[str | None] = None
    outcome: ClassVar[Outcome] = "client_error"
    headers: ClassVar[Mapping[str, str]] = {}
    engine_reason: str | None = None
    """The reason for a failure that the engine gives, for the log. It is never sent to a client."""

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def envelope(self) -> bytes:
        """Return the JSON body: `{"error": {"message", "type", "param", "code"}}`."""
        return envelope(self.message, self.type, self.param, self.code)

    def answer_headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that belong to this error, with lower-case names."""
        pairs = [(name.encode(), value.encode()) for name, value in self.headers.items()]
        if self.retry_after is not None:
            pairs.append((b"retry-after", b"%d" % self.retry_after))
        return pairs

    def header_lines(self) -> bytes:
        """Return the lines of `answer_headers` as they are sent."""
        return b"".join([b"%b: %b\r\n" % pair for pair in self.answer_headers()])


AnyError = TypeVar("AnyError", bound=BaseException)


def without_frames(error: AnyError) -> AnyError:
    """Return `error` without its traceback and its causes, whose tracebacks are dropped as well.

    A traceback holds the frames that it passed, and those hold the request and often the error
    itself: a reference cycle that would keep the body of the request until a full garbage
    collection. Call this where an error is kept, or caught in a function that holds a request.
    """
    left: list[BaseException] = [error]
    while left:
        last = left.pop()
        left += [before for before in (last.__cause__, last.__context__) if before is not None]
        last.__traceback__ = last.__cause__ = last.__context__ = None
    return error


def envelope(message: str, type: str, param: str | None, code: str | None) -> bytes:
    """Return OpenAI's error object as JSON."""
    return orjson.dumps({"error": {"message": message, "type": type, "param": param, "code": code}})


class Crash(GatewayError):
    """An internal error of the gateway."""

    outcome = "upstream_error"

    def __init__(self) -> None:
        super().__init__("The gateway failed to answer.")


class ModelUnloaded(GatewayError):
    """Interruption: the model was unloaded before the answer began.

    The request is sent again, so no client gets this.
    """

    outcome = "upstream_error"

    def __init__(self) -> None:
        super().__init__("The model was unloaded before the answer began.")


class InvalidRequest(GatewayError):
    status = 400
    type = INVALID_REQUEST
    code = "invalid_value"


class InvalidJson(InvalidRequest):
    code = "invalid_json"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class InvalidImage(InvalidRequest):
    code = "invalid_image"


class InvalidImageUrl(InvalidRequest):
    code = "invalid_image_url"


class SchemaTooComplex(InvalidRequest):
    """A JSON Schema that would take too much work to check, or to turn into a grammar."""

    def __init__(self, param: str) -> None:
        super().__init__(
            f"'{param}' is too complex: checking or converting its JSON Schema takes too much work. "
            "Use fewer or smaller 'allOf', 'anyOf', 'oneOf', 'enum' and '$ref'.",
            param=param,
        )


class RolesRefused(InvalidRequest):
    """The model's chat template does not accept the roles of the messages, or their order."""

    def __init__(self) -> None:
        super().__init__(
            "The chat template of this model refuses the order of the roles in 'messages'. Begin with 'user' after the "
            "system message, let 'user' and 'assistant' take turns, and answer each tool call with one 'tool' message.",
            param="messages",
        )


_TOO_LONG = {
    "messages": "The messages and the tokens to generate do",
    "prompt": "The prompt and the tokens to generate do",
    "documents": "The query and one of the documents do",
}


class ContextLengthExceeded(InvalidRequest):
    """The prompt and the answer do not fit into the model's context.

    The message also contains the code, because LangChain recognises the error by that word in the
    text. `param` is `messages`, `prompt`, `input` or `documents`.
    """

    code = "context_length_exceeded"

    def __init__(self, limit: int | None = None, param: str = "messages") -> None:
        known = f"This model's maximum context length is {limit} tokens. " if limit else ""
        what = _TOO_LONG.get(param, "One of the input texts does")
        super().__init__(f"{known}{what} not fit into the model's context (context_length_exceeded).", param=param)
        self.limit = limit


class InvalidApiKey(GatewayError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    headers: ClassVar[Mapping[str, str]] = {"www-authenticate": "Bearer"}

    def __init__(self) -> None:
        super().__init__("Incorrect or missing API key. Send it as 'Authorization: Bearer KEY'.")


class ExpiredApiKey(GatewayError):
    """The key is known, and its last day is over."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    headers: ClassVar[Mapping[str, str]] = {"www-authenticate": "Bearer"}

    def __init__(self) -> None:
        super().__init__("This API key has expired. Ask the operator of this gateway for a new one.")


class Forbidden(GatewayError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class TierNotAllowed(GatewayError):
    """The key may not use the model. `names` are public names that it may use."""

    status = 403
    type = "permission_error"
    code = "tier_not_allowed"

    def __init__(self, names: str) -> None:
        super().__init__(f"This API key may not use the requested model. It may use: {names or 'none'}.", param="model")


class RateLimited(GatewayError):
    """A key, or a person behind it, has reached a limit of its own.

    `limit` is the name of the limit, a label of `gateway_rate_limited_total`.
    """

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, limit: str, message: str, *, retry_after: int) -> None:
        super().__init__(message, retry_after=retry_after)
        self.limit = limit


class BudgetSpent(RateLimited):
    """The tokens of the day are used up. Tells clients not to retry, because that takes until midnight."""

    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false"}


class ConcurrencyExceeded(RateLimited):
    code = "concurrency_exceeded"


class ModelNotFound(GatewayError):
    """No model has the requested name. `model` is that name, if the message does not tell more."""

    status = 404
    type = INVALID_REQUEST
    code = "model_not_found"

    def __init__(self, message: str, *, param: str | None = None, model: str | None = None) -> None:
        super().__init__(message, param=param)
        self.model = model


class NotFound(GatewayError):
    status = 404
    type = INVALID_REQUEST
    code = "not_found"


class MethodNotAllowed(GatewayError):
    status = 405
    type = INVALID_REQUEST
    code = "method_not_allowed"

    def __init__(self, allowed: str) -> None:
        super().__init__(f"Method not allowed. Use {allowed} for this path.")
        self.allowed = allowed

    def answer_headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().answer_headers(), (b"allow", self.allowed.encode())]


class RequestTimeout(GatewayError):
    status = 408
    type = INVALID_REQUEST
    code = "request_timeout"


class Conflict(GatewayError):
    """A roll-out that a tier cannot follow, or a preflight check outdated by new settings."""

    status = 409
    type = INVALID_REQUEST
    code = "conflict"


class RequestTooLarge(GatewayError):
    status = 413
    type = INVALID_REQUEST
    code = "request_too_large"


class UnsupportedMediaType(GatewayError):
    status = 415
    type = INVALID_REQUEST
    code = "unsupported_media_type"


class HeadersTooLarge(GatewayError):
    status = 431
    type = INVALID_REQUEST
    code = "headers_too_large"


class UpstreamError(GatewayError):
    """The backend failed. `reason` is a label of `gateway_upstream_errors_total`."""

    status = 502
    code = "upstream_error"
    outcome = "upstream_error"

    def __init__(self, reason: str, message: str = "The model backend failed to answer.") -> None:
        super().__init__(message)
        self.reason = reason


class ServerHangs(UpstreamError):
    """Interruption: the server was ejected because it hangs, and the request can be served elsewhere."""

    def __init__(self) -> None:
        super().__init__("no_first_piece")


class LoopDetected(GatewayError):
    status = 508
    code = "loop_detected"
    outcome = "upstream_error"

    def __init__(self) -> None:
        super().__init__(
            "This request came from this gateway itself: the address of one of its backends leads back to it. "
            "Check OLLAMA_BASE_URL and VLLM_BASE_URL."
        )


class Overloaded(GatewayError):
    """503 with `Retry-After`: the gateway or the backend cannot take the request now."""

    status = 503
    outcome = "rejected"


class QueueFull(Overloaded):
    code = "queue_full"


class QueueTimeout(Overloaded):
    code = "queue_timeout"


class BackendUnavailable(Overloaded):
    """No server is healthy, or the backend reports that it is full.

    `pause` is the number of seconds for which the backend says it stays full, None if it does not
    say.
    """

    code = "backend_unavailable"
    pause: float | None = None


class ShuttingDown(Overloaded):
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("The gateway is shutting down. Try again.", retry_after=5)


class UpstreamTimeout(GatewayError):
    """No first token, no next token, or no end of the answer in time.

    Tells clients not to retry, because the next attempt would wait as long.
    """

    status = 504
    code = "upstream_timeout"
    outcome = "timeout"
    headers: ClassVar[Mapping[str, str]] = {"x-should-retry": "false"}

    def __init__(self, phase: str) -> None:
        super().__init__(f"The model backend did not answer in time ({phase}).")
        self.phase = phase


class ClientLeft(GatewayError):
    status = 499
    outcome = "cancelled"

    def __init__(self) -> None:
        super().__init__("The client disconnected.")
