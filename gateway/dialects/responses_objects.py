"""Objects of OpenAI's Responses API: the response, the items of its output, and errors. Pure.

Fields and their order are those of openai-python 2, types/responses.
"""

import re
from typing import Any

import msgspec
import orjson
from msgspec import Raw

from gateway.chat.answer import CallDelta, ChosenLogprob, FinishReason, Usage
from gateway.dialects.dialect import OpenAiErrors

INCOMPLETE: dict[FinishReason, str] = {"length": "max_output_tokens", "content_filter": "content_filter"}


def usage_object(usage: Usage | None) -> dict[str, Any] | None:
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def logprobs_fragment(logprobs: list[ChosenLogprob] | Raw | None) -> orjson.Fragment:
    return orjson.Fragment(bytes(logprobs) if isinstance(logprobs, Raw) else logprobs_json(logprobs or []))


def logprobs_json(logprobs: list[ChosenLogprob]) -> bytes:
    """Render the log probabilities. `bytes` is never null here, unlike in a chat completion."""
    # Quotes within strings are escaped, so this can only be the member.
    return msgspec.json.encode(logprobs).replace(b'"bytes":null', b'"bytes":[]')


def reasoning_item(id: str, text: str, status: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"id": id, "type": "reasoning", "summary": [], "content": content, "status": status}


def text_part(text: str, logprobs: list[ChosenLogprob] | Raw | None = None) -> dict[str, Any]:
    return {"type": "output_text", "annotations": [], "logprobs": logprobs_fragment(logprobs), "text": text}


def message_item(id: str, parts: list[dict[str, Any]], status: str) -> dict[str, Any]:
    return {"id": id, "type": "message", "status": status, "role": "assistant", "content": parts}


def call_item(id: str, call: CallDelta, status: str) -> dict[str, Any]:
    return {
        "id": id,
        "type": "function_call",
        "status": status,
        "arguments": call.arguments,
        "call_id": call.id,
        "name": call.name,
    }


def needs_message(kinds: set[str], is_cut: bool) -> bool:
    """Return whether an empty message has to be added to items of these kinds.

    Without a message or call, clients take an answer for unfinished. One of which only thoughts fit
    into the token limit is unfinished.
    """
    return not (kinds - {"reasoning", "nothing"}) and not (is_cut and "reasoning" in kinds)


class ResponseObject:
    """The response object of one request."""

    __slots__ = ("_fields", "suffix")

    def __init__(self, id: str, created: int, model: str, echo: dict[str, Any]) -> None:
        self.suffix = id
        self._fields = {
            "id": f"resp_{id}",
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "usage": None,
            **echo,
        }

    def item_id(self, prefix: str, index: int) -> str:
        return f"{prefix}_{self.suffix}{index:02x}"

    def begun(self) -> dict[str, Any]:
        return self._fields

    def ended(self, output: list[dict[str, Any]], finish: FinishReason | None, usage: Usage | None) -> dict[str, Any]:
        reason = None if finish is None else INCOMPLETE.get(finish)
        return self._fields | {
            "status": "completed" if reason is None else "incomplete",
            "incomplete_details": None if reason is None else {"reason": reason},
            "output": output,
            "usage": usage_object(usage),
        }

    def failed(self, message: str) -> dict[str, Any]:
        return self._fields | {"status": "failed", "error": {"code": "server_error", "message": message}}


class ResponseErrors(OpenAiErrors):
    """OpenAI's error object with the names of this API's fields."""

    __slots__ = ()

    fields = (
        (re.compile(r"\btools\[(\d+)\]\.function\."), r"tools[\1]."),
        (re.compile(r"\bresponse_format\b(\.json_schema)?"), "text.format"),
        (re.compile(r"\breasoning_effort\b"), "reasoning.effort"),
        (re.compile(r"^messages$"), "input"),
    )
