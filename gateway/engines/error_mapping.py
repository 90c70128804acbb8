"""Mapping of a backend's errors to the gateway's own errors and messages.

The backend's text is never passed on: it may contain its host, paths, names or the prompt. Only the
log gets a part of it, `engine_reason.py` says which. Seen on
Ollama 0.24 and 0.33 and vLLM 0.11 to 0.33; tests/golden/ has the recordings.
"""

import re

import orjson

from gateway.engines.engine_reason import engine_reason
from gateway.errors import (
    BackendUnavailable,
    ContextLengthExceeded,
    GatewayError,
    InvalidImage,
    InvalidRequest,
    LoopDetected,
    ModelNotFound,
    RequestTooLarge,
    RolesRefused,
    UnsupportedParameter,
    UpstreamError,
)

BUSY_SECONDS = 5
"""`Retry-After` in seconds for a busy backend. No engine reports how long it will be busy."""

MAX_MESSAGE = 16 * 1024
"""Characters of a message that are searched. 64 Ki of them would block the event loop for 40 ms."""

_CONTEXT = re.compile(
    r"maximum context length|context size|exceeds the context|exceed_context_size"
    r"|longer than the maximum model length|greater than max_model_len",
    re.IGNORECASE,
)
_CONTEXT_LIMIT = re.compile(
    r"(?:maximum context length is |available context size \(|\"n_ctx\":|greater than max_model_len=)(\d{1,9})"
)
_BAD_IMAGE = re.compile(
    r"failed to load image|cannot identify image|illegal base64|image: unknown format|invalid image"
    r"|failed to process inputs:|decode webp image:",
    re.IGNORECASE,
)
_NO_IMAGES = re.compile(
    r"not (?:a )?multimodal|does not support (?:multimodal|image)|missing data required for image", re.IGNORECASE
)
_MANY_IMAGES = re.compile(r"at most (\d{1,4}) image\(s\)", re.IGNORECASE)  # vLLM's --limit-mm-per-prompt
NO_INPUT = re.compile(r"no input provided", re.IGNORECASE)
"""Ollama 0.24, if the template makes no token of the messages."""
_REFUSED_FIELD = re.compile(r"\b(min_tokens|stop_token_ids|mm_processor_kwargs|continue_final_message)\b")
"""Fields of which a vLLM refuses some values. Its messages name them."""
_NO_THINKING = re.compile(r"does not support thinking", re.IGNORECASE)
_NO_TOOLS = re.compile(r"does not support tools|tool choice requires|--tool-call-parser", re.IGNORECASE)
_ROLES = re.compile(
    r"must alternate|system role|system message must be|no user query|unexpected (?:message )?role|only user(?:,| and) "
    r"|optional system message|(?:first|last) role|must start with a user|number of function calls and responses",
    re.IGNORECASE,
)
_BAD_GRAMMAR = re.compile(
    r"grammar|json schema|error parsing regex|structured.output|structural tag|invalid format"
    r"|failed to load model vocabulary",
    re.IGNORECASE,
)


def message_of(body: bytes) -> str:
    """Extract the error text from any of the engines' wrappings.

    Ollama 0.33's runner also nests JSON in a string.
    """
    text = body.decode("utf-8", "replace")
    for _ in range(4):
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            return text
        while isinstance(value, dict):
            value = next((value[key] for key in ("error", "message", "detail") if key in value), "")
            if isinstance(value, dict) and "n_ctx" in value:
                return orjson.dumps(value).decode()
        if not isinstance(value, str):
            return ""
        text = value
    return text


def client_error(status: int, body: bytes) -> GatewayError:
    """Return the client's error for a backend's answer with `status`, which is not 200."""
    message = message_of(body)[:MAX_MESSAGE]
    error = _error(status, message)
    if isinstance(error, UpstreamError | BackendUnavailable):
        error.engine_reason = engine_reason(message)
    return error


def _error(status: int, message: str) -> GatewayError:
    if status in (400, 413, 422, 500):
        fault = _client_fault(message)
        if fault is not None:
            return fault
    if status == 413:
        return RequestTooLarge("The request is too large for the model backend.")
    if status in (400, 422):
        return InvalidRequest("The model backend rejected the request as invalid.")
    if status == 404:
        return ModelNotFound("The model behind this name is not present on its backend.", param="model")
    if status in (429, 503):
        return BackendUnavailable("The model backend is busy. Try again.", retry_after=BUSY_SECONDS)
    if status == 508:
        return LoopDetected()
    return UpstreamError("auth" if status in (401, 403) else f"status_{status // 100}xx")


def _client_fault(message: str) -> GatewayError | None:
    """Return the error for a fault of the request itself. Engines report these as 400 or 500."""
    if _CONTEXT.search(message):
        limit = _CONTEXT_LIMIT.search(message)
        return ContextLengthExceeded(int(limit[1]) if limit else None)
    if _BAD_IMAGE.search(message):
        return InvalidImage(
            "An image in the request cannot be read. Send it as an intact PNG, JPEG, WebP or GIF.", param="messages"
        )
    image_limit = _MANY_IMAGES.search(message)
    if image_limit and int(image_limit[1]):
        return InvalidRequest(f"This model accepts at most {image_limit[1]} images in one request.", param="messages")
    if image_limit or _NO_IMAGES.search(message):
        return UnsupportedParameter("This model does not accept images.", param="messages")
    if NO_INPUT.search(message):
        return InvalidRequest("The messages have no text for the model. Send some.", param="messages")
    if _ROLES.search(message):
        return RolesRefused()
    if _NO_THINKING.search(message):
        return UnsupportedParameter(
            "This model does not support thinking. Leave 'reasoning_effort' out.", param="reasoning_effort"
        )
    if _NO_TOOLS.search(message):
        return UnsupportedParameter("This model does not support tools. Leave 'tools' out.", param="tools")
    field = _REFUSED_FIELD.search(message)
    if field:
        return InvalidRequest(f"The model backend does not accept this value of '{field[1]}'.", param=field[1])
    if _BAD_GRAMMAR.search(message):
        return InvalidRequest(
            "The model backend does not support this JSON Schema, pattern or grammar. Simplify it.",
            param="response_format",
        )
    return None
