"""Errors outside the data endpoints, in the form of the client API that the path belongs to."""

from gateway.api.paths import MESSAGE_PATHS
from gateway.dialects.anthropic_messages import AnthropicErrors
from gateway.dialects.dialect import ErrorForm, OpenAiErrors
from gateway.dialects.ollama_chat import OllamaErrors
from gateway.errors import GatewayError

_openai: ErrorForm = OpenAiErrors()
_anthropic: ErrorForm = AnthropicErrors()
_ollama: ErrorForm = OllamaErrors()


def error_form(path: str) -> ErrorForm:
    """Return how the client API of `path` writes errors."""
    if path.startswith("/api/"):
        return _ollama
    return _anthropic if path.startswith(MESSAGE_PATHS) else _openai


def error_answer(path: str, error: GatewayError) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the headers and the body of an error."""
    form = error_form(path)
    name, _, media_type = form.json_lines.strip().partition(b": ")
    return [(name, media_type), *error.answer_headers()], form.error_body(error)
