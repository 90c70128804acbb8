"""Text of the simulated model: depends on the prompt only, ends where the engines end it. Pure."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gateway.simulate.json_values import instance

END_OF_THOUGHT = "</think>"
_LENGTH = re.compile(r"\b(\d{1,6}) (?:words|tokens)\b", re.IGNORECASE)
_FILLER = ("the", "stand-in", "goes", "on", "with", "plain", "words")
_THOUGHT = ("Let", " me", " think", " about", " it", ".")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as the model sees it.

    `turns` are (role, text) pairs, `images` is their number, `tools` are in OpenAI's form. `leaks`:
    the reasoning becomes part of the content. `forced_strictly`: the arguments of a forced call
    follow the tool's schema. `literal`: the text that a grammar forces.
    """

    turns: tuple[tuple[str, str], ...]
    images: int = 0
    tools: tuple[dict[str, Any], ...] = ()
    schema: Any = None
    forced_tool: str | None = None
    thinks: bool = False
    leaks: bool = False
    forced_strictly: bool = True
    literal: str | None = None

    @property
    def text(self) -> str:
        return "\n".join(text for _, text in self.turns)

    @property
    def question(self) -> str:
        """Last non-empty user turn."""
        return next((text for role, text in reversed(self.turns) if role == "user" and text), "")


@dataclass(frozen=True, slots=True)
class GenerationLimits:
    """The limits that end a reply.

    Attributes:
        ignore_end: go on to `tokens` tokens, whatever the reply is.
        repeat_limit: equal tokens in a row that are allowed (0: any number).
        least: tokens before which the model does not end the reply.
        stops_in_order: of several stop strings found after a token, report the first in `stop`
            instead of the one that ends first in the text.
    """

    tokens: int
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    repeat_limit: int = 0
    stops_in_order: bool = False
    least: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of a reply, and the text that it adds to the reasoning or to the content."""

    kind: Literal["thinking", "content", "nothing"]
    text: str
    token: str


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call found in the content."""

    name: str
    arguments: Any


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """A complete reply: one piece for each token, and how it ends.

    `broken`: aborted because of a repetition, without a finish reason.
    """

    pieces: tuple[Piece, ...]
    finish: Literal["stop", "length"]
    stop_string: str | None = None
    broken: bool = False
    calls: tuple[Call, ...] = field(default=())

    def joined(self, kind: str) -> str:
        """Return the text of all pieces of this kind."""
        return "".join(piece.text for piece in self.pieces if piece.kind == kind)


def digest(text: str) -> str:
    """Return eight hex digits that identify the words of a prompt; whitespace does not matter."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:8]


def count_tokens(text: str) -> int:
    """Count the tokens of `text`, at four bytes each."""
    return (len(text.encode()) + 3) // 4


def compose(
    prompt: Prompt, length: int, variant: int = 0, bare_json_calls: bool = False, repeat_word: str = "repeat"
) -> list[str]:
    """Return the tokens of the reply: a digest of the prompt, the number of images and turns, then
    the question again.

    In the question, "repeat WORD" (with `repeat_word` in place of "repeat") makes the model repeat
    that word without end, and "N words" sets the length. A tool is called when the question
    contains a word of its name. With `prompt.schema` the reply is a value of that schema.
    """
    head = [*(["<think>"] if prompt.leaks else []), *_THOUGHT, END_OF_THOUGHT] if prompt.thinks or prompt.leaks else []
    mark = digest(prompt.text)
    if prompt.forced_tool or (called := _called_tool(prompt)):
        return head + _call_tokens(prompt, prompt.forced_tool or called or "", mark, bare_json_calls)
    if prompt.literal is not None:
        return head + _cut(prompt.literal, 4)
    if prompt.schema is not None:
        return head + _cut(json.dumps(instance(prompt.schema, mark)), 4)
    if repeated := re.search(rf"\b{re.escape(repeat_word)} (\S+)", prompt.question, re.IGNORECASE):
        return head + [f" {repeated[1].strip('.!?')}"] * 100_000
    if asked := _LENGTH.search(prompt.question):
        length = int(asked[1])
    start = [
        mark,
        " saw",
        f" {prompt.images}",
        " images",
        " and",
        f" {len(prompt.turns)}",
        " turns",
        f" ({variant})" if variant else ":",
    ]
    rest = (f" {word}" for word in itertools.chain(prompt.question.split()[:length], itertools.cycle(_FILLER)))
    return head + list(itertools.islice(itertools.chain(start, rest), length))


def tool_name(tool: dict[str, Any]) -> str:
    """Return the name of a tool's function; empty if it has none, which Ollama accepts."""
    function = tool.get("function")
    return str(function.get("name") or "") if isinstance(function, dict) else ""


def _called_tool(prompt: Prompt) -> str | None:
    """Return the tool whose name shares a word with the question; None after a tool result."""
    if not prompt.tools or prompt.schema is not None or prompt.turns[-1][0] == "tool":
        return None
    said = set(re.findall(r"\w+", prompt.question.lower()))
    for tool in prompt.tools:
        name = tool_name(tool)
        if name.lower() in said or said & {word for word in re.split(r"[_\W]+", name.lower()) if len(word) > 3}:
            return name
    return None


def _call_tokens(prompt: Prompt, name: str, mark: str, bare_json: bool) -> list[str]:
    schema = next((tool["function"].get("parameters") for tool in prompt.tools if tool_name(tool) == name), None)
    value = instance(schema, mark) if prompt.forced_strictly else [mark]
    arguments = _cut(json.dumps(value), 4)
    if bare_json:
        return [f'{{"name": "{name}", "parameters": ', *arguments, "}"]
    return ["<tool_call>\n", f'{{"name": "{name}", "arguments": ', *arguments, "}\n", "</tool_call>"]


def _cut(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def answer(
    tokens: Sequence[str],
    limits: GenerationLimits,
    thinks: bool = False,
    tools: bool = False,
    bare_json_calls: bool = False,
) -> GeneratedAnswer:
    """Return the reply that `tokens` become under `limits`.

    It ends at the length, a stop string or a repetition; reasoning and tool calls are separated
    from the content.
    """
    least = limits.tokens if limits.ignore_end else min(limits.least, limits.tokens)
    if tokens and len(tokens) < least:
        tokens = list(itertools.islice(itertools.chain(tokens, itertools.cycle(f" {word}" for word in _FILLER)), least))
    kept = list(tokens[: limits.tokens])
    finish: Literal["stop", "length"] = "length" if len(tokens) >= limits.tokens else "stop"
    broken = False
    if limits.repeat_limit and (end := _end_of_repetition(kept, limits.repeat_limit)):
        kept, broken = kept[:end], True
    stop_at, stop_string = _find_stop(kept, limits) or (None, None)
    if stop_at is not None and stop_string is not None:
        kept, finish = _until(kept, stop_at + len(stop_string)), "stop"
    pieces = tuple(_classified_pieces(kept, stop_at, thinks))
    calls: tuple[Call, ...] = ()
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    if tools and not broken:
        calls = _parse_calls(content, bare_json_calls)
    return GeneratedAnswer(pieces, finish, stop_string, broken, calls)


def _end_of_repetition(tokens: Sequence[str], most: int) -> int | None:
    last, equal = None, 0
    for i, token in enumerate(tokens):
        equal = equal + 1 if token.strip() == last else 1
        last = token.strip()
        if equal > most:
            return i + 1
    return None


def _find_stop(tokens: Sequence[str], limits: GenerationLimits) -> tuple[int, str] | None:
    """Find the stop string that ends first: the engines check after each token."""
    text = "".join(tokens)
    found = [(text.index(stop), stop) for stop in limits.stop if stop and stop in text]
    first = min(found, key=lambda hit: hit[0] + len(hit[1]), default=None)
    if first is None or not limits.stops_in_order:
        return first
    read = "".join(_until(tokens, first[0] + len(first[1])))
    return next((read.index(stop), stop) for stop in limits.stop if stop and stop in read)


def _until(tokens: Sequence[str], end: int) -> list[str]:
    """Return the tokens up to the end of the stop string: all of them count as generated."""
    total = 0
    for i, token in enumerate(tokens):
        total += len(token)
        if total >= end:
            return list(tokens[: i + 1])
    return list(tokens)


def _classified_pieces(tokens: Sequence[str], stop_at: int | None, thinks: bool) -> Iterable[Piece]:
    thinking, position = thinks, 0
    for token in tokens:
        text = token if stop_at is None else token[: max(0, stop_at - position)]
        position += len(token)
        if thinking and token.strip() == END_OF_THOUGHT:
            thinking = False
            yield Piece("nothing", "", token)
        else:
            yield Piece(("thinking" if thinking else "content") if text else "nothing", text, token)


def _parse_calls(content: str, bare_json: bool) -> tuple[Call, ...]:
    """Return the complete calls in the content, or none if one was cut off and stays content."""
    sources = [content] if bare_json else re.findall(r"<tool_call>(.*?)</tool_call>", content, re.DOTALL)
    calls = []
    for source in sources:
        try:
            found = json.loads(source)
        except ValueError:
            return ()
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return ()
        calls.append(Call(found["name"], found.get("arguments", found.get("parameters", {}))))
    return tuple(calls)


def logprob(token: str, top: int, keeps_empty: bool) -> dict[str, Any]:
    """Return OpenAI's log probability entry for `token` with `top` alternatives.

    With `keeps_empty` an empty list of alternatives is kept (vLLM), else left out (Ollama).
    """
    entry: dict[str, Any] = {"token": token, "logprob": -0.5, "bytes": list(token.encode())}
    others = [token, *(f" {word}" for word in _FILLER)][:top]
    if others or keeps_empty:
        entry["top_logprobs"] = [
            {"token": other, "logprob": -0.5 - i, "bytes": list(other.encode())} for i, other in enumerate(others)
        ]
    return entry
