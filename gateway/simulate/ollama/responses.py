"""Rendering of Ollama's responses, native and OpenAI-compatible, keys in the order of Go's
structs.
"""

import random
import time
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from gateway.simulate.ollama.catalog import go_timestamp
from gateway.simulate.ollama.requests import EndpointError, Job
from gateway.simulate.text import Call, GeneratedAnswer, Piece, logprob

NATIVE_JSON = "application/json; charset=utf-8"
_GO_ESCAPES = ((b"<", b"\\u003c"), (b">", b"\\u003e"), (b"&", b"\\u0026"))
_RUNNER_CRASHED = "an error was encountered while running the model: unexpected EOF"


def dump(value: Any) -> bytes:
    """Encode as JSON with Go's HTML escapes."""
    data = orjson.dumps(value)
    for plain, escaped in _GO_ESCAPES:
        data = data.replace(plain, escaped)
    return data


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts and durations (nanoseconds) of a finished reply."""

    prompt_tokens: int
    tokens: int
    total: int
    load: int
    prefill: int
    generation: int

    def native(self) -> dict[str, int]:
        """Return them as the native endpoints do: zeros are left out."""
        counts = {
            "total_duration": self.total,
            "load_duration": self.load,
            "prompt_eval_count": self.prompt_tokens,
            "prompt_eval_duration": self.prefill,
            "eval_count": self.tokens,
            "eval_duration": self.generation,
        }
        return {name: count for name, count in counts.items() if count}

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
        }


ZERO = Figures(0, 0, 0, 0, 0, 0)


class Renderer(Protocol):
    """Format of a reply: streamed as pieces, tool calls and an end, or as a complete body.

    `crash` is the last event of a stream whose runner has failed.
    """

    plain_type: str
    stream_type: str

    def piece(self, piece: Piece) -> bytes: ...
    def calls(self, calls: tuple[Call, ...]) -> bytes: ...
    def end(self, answer: GeneratedAnswer, figures: Figures) -> bytes: ...
    def body(self, answer: GeneratedAnswer, figures: Figures) -> bytes: ...
    def crash(self) -> bytes: ...


class NativeChat:
    """`POST /api/chat`."""

    plain_type = NATIVE_JSON
    stream_type = "application/x-ndjson"

    def __init__(self, job: Job) -> None:
        self._job = job

    def _line(self, message: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "model": self._job.requested_model,
            "created_at": go_timestamp(),
            "message": {"role": "assistant", "content": "", **message},
            **more,
        }

    def piece(self, piece: Piece) -> bytes:
        return dump(self._line({piece.kind: piece.text}, done=False, **self._logprobs((piece,)))) + b"\n"

    def calls(self, calls: tuple[Call, ...]) -> bytes:
        return dump(self._line({"tool_calls": self._calls(calls)}, done=False)) + b"\n"

    def end(self, answer: GeneratedAnswer, figures: Figures) -> bytes:
        return dump(self._line({}, done=True, done_reason=answer.finish, **self._ending(figures, ()))) + b"\n"

    def body(self, answer: GeneratedAnswer, figures: Figures) -> bytes:
        message: dict[str, Any] = {"content": "" if answer.calls else answer.joined("content")}
        if thinking := answer.joined("thinking"):
            message["thinking"] = thinking
        if answer.calls:
            message["tool_calls"] = self._calls(answer.calls)
        if answer.broken:
            return dump(self._line(message, done=False))
        return dump(self._line(message, done=True, done_reason=answer.finish, **self._ending(figures, answer.pieces)))

    def _ending(self, figures: Figures, pieces: tuple[Piece, ...]) -> dict[str, Any]:
        return {**(self._logprobs(pieces) if pieces else {}), **figures.native()}

    def crash(self) -> bytes:
        return dump({"error": _RUNNER_CRASHED}) + b"\n"

    def _logprobs(self, pieces: tuple[Piece, ...]) -> dict[str, Any]:
        top = self._job.top_logprobs
        return {} if top is None else {"logprobs": [logprob(piece.token, top, keeps_empty=False) for piece in pieces]}

    def _calls(self, calls: tuple[Call, ...]) -> list[dict[str, Any]]:
        functions = ({"index": i, "name": call.name, "arguments": call.arguments} for i, call in enumerate(calls))
        return [{"id": _call_id(), "function": function} for function in functions]


class NativeGenerate(NativeChat):
    """`POST /api/generate`."""

    def _line(self, message: dict[str, Any], **more: Any) -> dict[str, Any]:
        thinking = {"thinking": message["thinking"]} if "thinking" in message else {}
        return {
            "model": self._job.requested_model,
            "created_at": go_timestamp(),
            "response": message.get("content", ""),
            **thinking,
            **more,
        }

    def _ending(self, figures: Figures, pieces: tuple[Piece, ...]) -> dict[str, Any]:
        """Add the tokens of prompt and reply as `context` for a follow-up request, unless the
        prompt was raw.
        """
        tokens = list(range(1, figures.prompt_tokens + figures.tokens + 1))
        return {
            **({} if self._job.raw else {"context": tokens}),
            **figures.native(),
            **(self._logprobs(pieces) if pieces else {}),
        }

    def calls(self, calls: tuple[Call, ...]) -> bytes:
        raise AssertionError("a completion has no tool calls")


class V1Chat:
    """`POST /v1/chat/completions`.

    From 0.32.6 on, Ollama sends the role once and the finish reason in a chunk of its own; before,
    every delta had the role.
    """

    plain_type = "application/json"
    stream_type = "text/event-stream"

    def __init__(self, job: Job, newer: bool) -> None:
        self._job = job
        self._newer = newer
        self._id = f"chatcmpl-{random.randrange(999)}"
        self._began = False

    def _chunk(self, choices: list[dict[str, Any]], model: str | None = None, **more: Any) -> bytes:
        chunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": self._job.requested_model if model is None else model,
            "system_fingerprint": "fp_ollama",
            "choices": choices,
            **more,
        }
        return b"data: " + dump(chunk) + b"\n\n"

    def _delta(self, delta: dict[str, Any], finish: str | None = None, model: str | None = None, **more: Any) -> bytes:
        if not (self._newer and (self._began or finish)):
            delta = {"role": "assistant", **delta}
        self._began = True
        return self._chunk([{"index": 0, "delta": delta, "finish_reason": finish, **more}], model)

    def piece(self, piece: Piece) -> bytes:
        more = self._logprobs((piece,))
        if piece.kind == "thinking":
            return self._delta({"content": "", "reasoning": piece.text}, **more)
        return self._delta({"content": piece.text}, **more)

    def calls(self, calls: tuple[Call, ...]) -> bytes:
        return self._delta({"content": "", "tool_calls": self._calls(calls)})

    def end(self, answer: GeneratedAnswer, figures: Figures) -> bytes:
        finish = "tool_calls" if answer.calls else answer.finish
        data = self._delta({} if self._newer else {"content": ""}, finish)
        if self._job.include_usage:
            data += self._chunk([], usage=figures.usage())
        return data + b"data: [DONE]\n\n"

    def body(self, answer: GeneratedAnswer, figures: Figures) -> bytes:
        message: dict[str, Any] = {"role": "assistant", "content": "" if answer.calls else answer.joined("content")}
        if thinking := answer.joined("thinking"):
            message["reasoning"] = thinking
        if answer.calls:
            message["tool_calls"] = self._calls(answer.calls)
        finish = None if answer.broken else "tool_calls" if answer.calls else answer.finish
        usage = ZERO.usage() if answer.broken else figures.usage()
        return self._completion(message, finish, usage, **self._logprobs(answer.pieces))

    def empty(self, finish: str) -> bytes:
        """Return the response to a request that only loads the model."""
        return self._completion({"role": "assistant", "content": ""}, finish, ZERO.usage())

    def _completion(self, message: dict[str, Any], finish: str | None, usage: dict[str, int], **more: Any) -> bytes:
        body = {
            "id": self._id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self._job.requested_model,
            "system_fingerprint": "fp_ollama",
            "choices": [{"index": 0, "message": message, "finish_reason": finish, **more}],
            "usage": usage,
        }
        return dump(body) + b"\n"

    def crash(self) -> bytes:
        """Return one empty chunk without a model and without `[DONE]`: Ollama hides the error."""
        return self._delta({"content": ""}, model="")

    def _logprobs(self, pieces: tuple[Piece, ...]) -> dict[str, Any]:
        top = self._job.top_logprobs
        return (
            {}
            if top is None
            else {"logprobs": {"content": [logprob(piece.token, top, keeps_empty=False) for piece in pieces]}}
        )

    def _calls(self, calls: tuple[Call, ...]) -> list[dict[str, Any]]:
        functions = ({"name": call.name, "arguments": dump(call.arguments).decode()} for call in calls)
        return [
            {"id": _call_id(), "index": i, "type": "function", "function": function}
            for i, function in enumerate(functions)
        ]


class V1Completion(V1Chat):
    """`POST /v1/completions`."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, newer=True)
        self._id = self._id.removeprefix("chat")

    def _text(self, text: str, finish: str | None, usage: dict[str, int] | None) -> dict[str, Any]:
        """Return a complete body if there is a `usage`, else a chunk; their keys differ in
        order.
        """
        head = {"id": self._id, "object": "text_completion", "created": int(time.time())}
        model = {"model": self._job.requested_model, "system_fingerprint": "fp_ollama"}
        choices = {"choices": [{"text": text, "index": 0, "finish_reason": finish}]}
        if usage is not None:
            return {**head, **model, **choices, "usage": usage}
        return {**head, **choices, **model, **({"usage": ZERO.usage()} if self._job.include_usage else {})}

    def piece(self, piece: Piece) -> bytes:
        return b"data: " + dump(self._text(piece.text, None, None)) + b"\n\n"

    def end(self, answer: GeneratedAnswer, figures: Figures) -> bytes:
        data = b"data: " + dump(self._text("", answer.finish, None)) + b"\n\n"
        if self._job.include_usage:
            data += b"data: " + dump({**self._text("", None, None), "choices": [], "usage": figures.usage()}) + b"\n\n"
        return data + b"data: [DONE]\n\n"

    def body(self, answer: GeneratedAnswer, figures: Figures) -> bytes:
        return dump(self._text(answer.joined("content"), answer.finish, figures.usage())) + b"\n"

    def empty(self, finish: str) -> bytes:
        return dump(self._text("", finish, ZERO.usage())) + b"\n"

    def crash(self) -> bytes:
        return b"data: " + dump(self._text("", None, None)) + b"\n\n"


def error_body(openai: bool, status: int, message: str, from_endpoint: bool = False) -> tuple[str, bytes]:
    """Return the content type and body of an error.

    Errors that the OpenAI-compatible endpoint passes on from the native handler end with a line
    feed and name no charset.
    """
    if not openai:
        return NATIVE_JSON, dump({"error": message})
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")
    body = dump({"error": {"message": message, "type": kind, "param": None, "code": None}})
    return (NATIVE_JSON, body) if from_endpoint else ("application/json", body + b"\n")


def is_endpoint_error(error: Exception) -> bool:
    """Return whether the endpoint itself found the error, not the native handler."""
    return isinstance(error, EndpointError)


def _call_id() -> str:
    return "call_" + "".join(random.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=8))
