"""Rendering of vLLM 0.32's responses: a complete body or its chunks, with all their nulls."""

import json
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

import orjson

from gateway.simulate.text import GeneratedAnswer, Piece, logprob
from gateway.simulate.vllm.requests import Job

FINGERPRINT = "vllm-0.32.0-882afe58"
DONE = b"data: [DONE]\n\n"
ENGINE_ERROR = {
    "error": {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}
}


def event(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def finish_reason(answer: GeneratedAnswer, named_tool: bool) -> str:
    """Return `tool_calls` for an answer with calls, but `stop` if the request named the tool."""
    return "tool_calls" if answer.calls and not named_tool else answer.finish


class ChatRenderer:
    """Renderer of one chat completion; `reasons`: the server has a reasoning parser."""

    def __init__(self, job: Job, request_id: str | None, reasons: bool) -> None:
        self._job = job
        self._id = f"chatcmpl-{request_id or secrets.token_hex(8)}"
        self._created = int(time.time())
        self._reasons = reasons

    def body(self, answers: list[GeneratedAnswer]) -> bytes:
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

    def _choice(self, index: int, answer: GeneratedAnswer) -> dict[str, Any]:
        content: str | None = answer.joined("content") or None
        if answer.calls or (content is None and self._job.named_tool):
            content = "" if self._job.named_tool else None
        nothing = {"refusal": None, "annotations": None, "audio": None, "function_call": None}
        message: dict[str, Any] = {"role": "assistant", "content": content, **nothing}
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": _tool_id(),
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
                }
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
        """Return the first chunk of each choice."""
        return b"".join(self._role(index) for index in range(self._job.choices))

    def _role(self, index: int) -> bytes:
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return event(self._chunk([choice], **self._count(0), prompt_token_ids=None, prompt_text=None))

    def deltas(self, index: int, answer: GeneratedAnswer) -> Iterator[bytes]:
        """Yield the chunks of each token of one choice; some tokens have none.

        A reply that ends at its length or a stop string finishes with its last token. One that the
        model ended itself has one more chunk, whose delta is empty if the server has a parser.
        """
        last = len(answer.pieces) - 1 if answer.finish == "length" or answer.stop_string is not None else None
        nothing = {} if self._job.has_parser else {"content": ""}
        calls = CallReader() if self._job.prompt.tools else None
        for number, piece in enumerate(answer.pieces):
            found = _piece_deltas(piece, calls)
            if number == last:
                yield self._delta(index, found[-1] if found else nothing, (piece,), number + 1, answer)
            else:
                yield b"".join(self._delta(index, delta, (piece,), number + 1) for delta in found)
        if last is None or not answer.pieces:
            yield self._delta(index, nothing, (), len(answer.pieces), answer)

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        pieces: tuple[Piece, ...],
        count: int,
        ending: GeneratedAnswer | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(pieces) if pieces else None,
        }
        choice["finish_reason"] = finish_reason(ending, self._job.named_tool) if ending else None
        if ending:
            choice["stop_reason"] = ending.stop_string
        choice["token_ids"] = None
        more = {"system_fingerprint": FINGERPRINT} if ending and not self._job.include_usage else {}
        return event(self._chunk([choice], **self._count(count), **more))

    def _count(self, tokens: int) -> dict[str, Any]:
        """Return the usage so far, for clients that ask for it on each chunk."""
        if not self._job.counts_each:
            return {}
        prompt = self._job.prompt_tokens
        details = {"completion_tokens_details": None}
        return {
            "usage": {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens, **details}
        }

    def usage_chunk(self, answers: list[GeneratedAnswer]) -> bytes:
        return event(self._chunk([], usage=self._usage(answers, plain=False), system_fingerprint=FINGERPRINT))

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._job.model.name,
        }
        return {**head, "choices": choices, **more}

    def _usage(self, answers: list[GeneratedAnswer], plain: bool) -> dict[str, Any]:
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


class CompletionRenderer:
    """Renderer of one `/v1/completions` answer."""

    def __init__(self, job: Job, request_id: str | None) -> None:
        self._job = job
        self._id = f"cmpl-{request_id or secrets.token_hex(8)}"
        self._created = int(time.time())

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._job.model.name}

    def body(self, answers: list[GeneratedAnswer]) -> bytes:
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        usage = {**self._usage(answers), "prompt_tokens_details": None, "completion_tokens_details": None}
        last = {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}
        body = {
            **self._head(),
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": usage,
            **last,
        }
        return orjson.dumps(body)

    def _choice(self, index: int, answer: GeneratedAnswer) -> dict[str, Any]:
        return {
            "index": index,
            "text": answer.joined("content"),
            "logprobs": self._logprobs(answer.pieces, 0),
            "finish_reason": answer.finish,
            "stop_reason": answer.stop_string,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }

    def roles(self) -> bytes:
        return b""

    def deltas(self, index: int, answer: GeneratedAnswer) -> Iterator[bytes]:
        offset = 0
        for number, piece in enumerate(answer.pieces):
            ends = number == len(answer.pieces) - 1
            choice = {"index": index, "text": piece.text, "logprobs": self._logprobs((piece,), offset)}
            choice |= {
                "finish_reason": answer.finish if ends else None,
                "stop_reason": answer.stop_string if ends else None,
            }
            choice |= {"prompt_token_ids": None, "token_ids": None}
            more = {"system_fingerprint": FINGERPRINT} if ends and not self._job.include_usage else {}
            yield event({**self._head(), "choices": [choice], **more})
            offset += len(piece.token)

    def usage_chunk(self, answers: list[GeneratedAnswer]) -> bytes:
        return event({**self._head(), "choices": [], "usage": self._usage(answers), "system_fingerprint": FINGERPRINT})

    def _usage(self, answers: list[GeneratedAnswer]) -> dict[str, int]:
        tokens, prompt_tokens = sum(len(answer.pieces) for answer in answers), self._job.prompt_tokens
        return {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + tokens, "completion_tokens": tokens}

    def _logprobs(self, pieces: tuple[Piece, ...], offset: int) -> dict[str, Any] | None:
        if self._job.top_logprobs is None:
            return None
        found = [logprob(piece.token, self._job.top_logprobs, keeps_empty=True) for piece in pieces]
        offsets = [offset + sum(len(piece.token) for piece in pieces[:i]) for i in range(len(pieces))]
        return {
            "text_offset": offsets,
            "token_logprobs": [entry["logprob"] for entry in found],
            "tokens": [entry["token"] for entry in found],
            "top_logprobs": [{other["token"]: other["logprob"] for other in entry["top_logprobs"]} for entry in found],
        }


class CallReader:
    """Streaming tool parser: emits the name of a call once it is complete, then its arguments as
    they grow. Text outside a call passes through.
    """

    _HEAD = re.compile(r'\s*\{\s*"name":\s*"([^"]+)",\s*"arguments":\s*')

    def __init__(self) -> None:
        self._text = ""
        self._index = 0
        self._sent: int | None = None

    def read(self, text: str) -> list[dict[str, Any]]:
        """Append `text` to what was read before, and return the deltas that are now complete."""
        self._text += text
        if not self._text.startswith("<"):
            return [{"content": text}]
        deltas: list[dict[str, Any]] = []
        head = self._HEAD.match(self._text.removeprefix("<tool_call>"))
        if head is None:
            return deltas
        if self._sent is None:
            self._sent = 0
            deltas.append(
                self._call({"id": _tool_id(), "type": "function", "index": self._index, "function": {"name": head[1]}})
            )
        raw = self._text.removeprefix("<tool_call>")[head.end() :]
        arguments = _first_value(raw)
        if len(arguments) > self._sent:
            deltas.append(self._call({"index": self._index, "function": {"arguments": arguments[self._sent :]}}))
            self._sent = len(arguments)
        if "</tool_call>" in raw:
            self._text, self._sent, self._index = raw.partition("</tool_call>")[2].lstrip(), None, self._index + 1
        return deltas

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        return {"content": None, "tool_calls": [call]}


def _piece_deltas(piece: Piece, calls: CallReader | None) -> list[dict[str, Any]]:
    if piece.kind == "thinking":
        return [{"reasoning": piece.text}]
    if piece.kind != "content":
        return []
    return [{"content": piece.text}] if calls is None else calls.read(piece.text)


def _first_value(raw: str) -> str:
    """Return the JSON value at the start of `raw`, as far as it is there."""
    try:
        return raw[: json.JSONDecoder().raw_decode(raw)[1]]
    except ValueError:
        return raw


def _tool_id() -> str:
    return f"chatcmpl-tool-{secrets.token_hex(8)}"
