"""How vLLM 0.32 writes an answer: the completion at once, or its chunks, with all their nulls."""

import secrets
import time
from collections.abc import Iterator
from typing import Any

import orjson

from gateway.simulate.vllm_requests import Job
from gateway.simulate.words import Answer, Piece, logprob

FINGERPRINT = "vllm-0.32.0-882afe58"
DONE = b"data: [DONE]\n\n"
ENGINE_ERROR = {"error": {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}}


def event(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def finish_reason(answer: Answer, named_tool: bool) -> str:
    """A named tool choice ends with `stop`, every other call with `tool_calls`."""
    return "tool_calls" if answer.calls and not named_tool else answer.finish


class Chat:
    """One `/v1/chat/completions` answer; `reasons` when the server has a reasoning parser."""

    def __init__(self, job: Job, request_id: str | None, reasons: bool) -> None:
        self._job = job
        self._id = f"chatcmpl-{request_id or secrets.token_hex(8)}"
        self._created = int(time.time())
        self._reasons = reasons

    def whole(self, answers: list[Answer]) -> bytes:
        body = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._job.model.name,
            "choices": [self._choice(i, answer) for i, answer in enumerate(answers)],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": self._usage(answers, plain=True),
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
        return orjson.dumps(body)

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        content: str | None = answer.joined("content") or None
        if answer.calls or (content is None and self._job.named_tool):
            content = "" if self._job.named_tool else None
        nothing = {"refusal": None, "annotations": None, "audio": None, "function_call": None}
        message: dict[str, Any] = {"role": "assistant", "content": content, **nothing}
        if answer.calls:
            message["tool_calls"] = [
                {"id": _tool_id(), "type": "function", "function": {"name": call.name, "arguments": orjson.dumps(call.arguments).decode()}}
                for call in answer.calls
            ]
        message["reasoning"] = answer.joined("thinking") or None
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.pieces),
            "finish_reason": finish_reason(answer, self._job.named_tool),
            "stop_reason": answer.stop_string,
            "token_ids": None,
            "routed_experts": None,
        }

    def roles(self) -> bytes:
        """The first chunk of each choice."""
        return b"".join(self._role(index) for index in range(self._job.choices))

    def _role(self, index: int) -> bytes:
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return event(self._chunk([choice], prompt_token_ids=None, prompt_text=None))

    def deltas(self, index: int, answer: Answer) -> Iterator[bytes]:
        """What goes out for each token of one choice, in turn (nothing for some), and a last one where the model ended by itself.

        A reply cut at its length finishes with its last token; one that ended has a chunk more.
        """
        for delta, pieces, is_last in self._tokens(answer):
            if not is_last:
                yield self._delta(index, delta, pieces) if delta is not None else b""
                continue
            if delta is None:
                delta = {"content": ""}
            yield self._delta(index, delta, pieces, answer)
        if answer.finish == "stop" or not answer.pieces:
            yield self._delta(index, {"content": ""}, (), answer)

    def _tokens(self, answer: Answer) -> Iterator[tuple[dict[str, Any] | None, tuple[Piece, ...], bool]]:
        """For each token: its delta, if any, its piece, and whether it carries the finish."""
        call_deltas = _call_deltas(answer) if answer.calls else None
        last = len(answer.pieces) - 1 if answer.finish == "length" else None
        for number, piece in enumerate(answer.pieces):
            delta: dict[str, Any] | None = None
            if piece.kind == "thinking":
                delta = {"reasoning": piece.text}
            elif piece.kind == "content":
                delta = {"content": piece.text} if call_deltas is None else next(call_deltas, None)
            yield delta, (piece,), number == last

    def _delta(self, index: int, delta: dict[str, Any], pieces: tuple[Piece, ...], ending: Answer | None = None) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": self._logprobs(pieces) if pieces else None}
        choice["finish_reason"] = finish_reason(ending, self._job.named_tool) if ending else None
        if ending:
            choice["stop_reason"] = ending.stop_string
        choice["token_ids"] = None
        more = {"system_fingerprint": FINGERPRINT} if ending and not self._job.include_usage else {}
        return event(self._chunk([choice], **more))

    def usage_chunk(self, answers: list[Answer]) -> bytes:
        return event(self._chunk([], usage=self._usage(answers, plain=False), system_fingerprint=FINGERPRINT))

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._job.model.name}
        return {**head, "choices": choices, **more}

    def _usage(self, answers: list[Answer], plain: bool) -> dict[str, Any]:
        tokens = sum(len(answer.pieces) for answer in answers)
        usage: dict[str, Any] = {
            "prompt_tokens": self._job.prompt_tokens,
            "total_tokens": self._job.prompt_tokens + tokens,
            "completion_tokens": tokens,
        }
        reasoning = sum(piece.kind == "thinking" for answer in answers for piece in answer.pieces)
        details = {"reasoning_tokens": reasoning} if self._reasons else None
        if plain:
            usage["prompt_tokens_details"] = None
        if plain or details:
            usage["completion_tokens_details"] = details
        return usage

    def _logprobs(self, pieces: tuple[Piece, ...]) -> dict[str, Any] | None:
        top = self._job.top_logprobs
        return None if top is None else {"content": [logprob(piece.token, top, keeps_empty=True) for piece in pieces]}


class Completion:
    """One `/v1/completions` answer."""

    def __init__(self, job: Job, request_id: str | None) -> None:
        self._job = job
        self._id = f"cmpl-{request_id or secrets.token_hex(8)}"
        self._created = int(time.time())

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._job.model.name}

    def whole(self, answers: list[Answer]) -> bytes:
        (answer,) = answers
        tokens, prompt_tokens = len(answer.pieces), self._job.prompt_tokens
        choice = {
            "index": 0,
            "text": answer.joined("content"),
            "logprobs": None,
            "finish_reason": answer.finish,
            "stop_reason": answer.stop_string,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }
        usage = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + tokens,
            "completion_tokens": tokens,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }
        last = {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}
        body = {**self._head(), "choices": [choice], "service_tier": None, "system_fingerprint": FINGERPRINT, "usage": usage, **last}
        return orjson.dumps(body)

    def roles(self) -> bytes:
        return b""

    def deltas(self, index: int, answer: Answer) -> Iterator[bytes]:
        for number, piece in enumerate(answer.pieces):
            ends = number == len(answer.pieces) - 1
            choice = {"index": index, "text": piece.text, "logprobs": None, "finish_reason": answer.finish if ends else None}
            yield event({**self._head(), "choices": [{**choice, "stop_reason": answer.stop_string}]})

    def usage_chunk(self, answers: list[Answer]) -> bytes:
        return b""


def _call_deltas(answer: Answer) -> Iterator[dict[str, Any]]:
    """The deltas of all calls: the name, then the arguments in pieces; one is taken for each token of content."""
    for index, call in enumerate(answer.calls):
        yield {"tool_calls": [{"id": _tool_id(), "type": "function", "index": index, "function": {"name": call.name}}]}
        arguments = orjson.dumps(call.arguments).decode()
        tokens = sum(piece.kind == "content" for piece in answer.pieces) // len(answer.calls)
        size = -(-len(arguments) // max(1, tokens - 1))  # rounded up, so that no delta is left without a token
        for start in range(0, len(arguments), size):
            yield {"tool_calls": [{"index": index, "function": {"arguments": arguments[start : start + size]}}]}


def _tool_id() -> str:
    return f"chatcmpl-tool-{secrets.token_hex(8)}"
