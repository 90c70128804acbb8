"""Checks of streaming: pieces come one by one, and the stream ends as OpenAI's does."""

from gateway.bench.verify.outcome import Check, CheckFailed, CheckSkipped, Reason
from gateway.bench.verify.target import Event, Stream, Target, first_choice

PIECES = 64
"""Tokens that are asked for."""

LEAST_SPREAD = 0.25
"""Least share of the time of generation in which the pieces have to arrive; buffered ones arrive at
its end, in no time."""

FEW = 8
"""Tokens below which a single piece proves nothing: random weights write tokens without a text."""

TOO_FAST = 0.05
"""Seconds of generation below which a buffer cannot be told from a quick server."""

TRIES = 3
"""A busy machine may send or read a short stream late and whole, so each try asks for more; a buffer
shows each time."""
LONGER = 4
"""Each try asks for this many times the tokens of the one before."""


async def comes_piece_by_piece(target: Target) -> Reason:
    """Compare the time in which the pieces arrive with the time of generation.

    The latter is the time of the answer less that of an answer of one token, which has the same
    network, queue and prompt.
    """
    pieces: list[Event] = []
    spread = first = 0.0
    for number in range(TRIES):
        short = await _seconds_of_one_token(target)
        tokens = PIECES * LONGER**number
        stream = await streamed(target, max_tokens=tokens, stream_options={"include_usage": True})
        pieces, whole = _several(stream), stream.ended - stream.sent
        generation = whole - short
        if generation < TOO_FAST:  # or the answer of one token came late
            generation = max(generation, whole - await _seconds_of_one_token(target))
        spread, first = pieces[-1].at - pieces[0].at, pieces[0].at - stream.sent
        if generation < TOO_FAST:
            milliseconds = f"{max(0.0, generation) * 1000:.0f}"
            return Reason("pieces_too_fast", {"pieces": len(pieces), "milliseconds": milliseconds})
        if spread >= LEAST_SPREAD * generation and len({event.read for event in pieces}) > 1:
            return Reason("pieces", {"pieces": len(pieces), "first": f"{first:.2f}", "whole": f"{whole:.2f}"})
    raise CheckFailed("buffered", pieces=len(pieces), spread=f"{spread * 1000:.0f}", first=f"{first:.2f}")


async def _seconds_of_one_token(target: Target) -> float:
    stream = await streamed(target, max_tokens=1)
    return stream.ended - stream.sent


def _several(stream: Stream) -> list[Event]:
    """Return the pieces of an answer that has more than one."""
    pieces = stream.pieces
    usage = stream.usages[-1] if stream.usages else {}
    tokens = usage.get("completion_tokens") or len("".join(event.text for event in pieces).split())
    if not pieces:
        raise CheckFailed("no_pieces", events=len(stream.events))
    if len(pieces) < 2:
        if tokens < FEW:
            raise CheckSkipped("answer_too_short", tokens=tokens)
        raise CheckFailed("one_piece", tokens=tokens)
    return pieces


async def ends_with_done(target: Target) -> None:
    stream = await streamed(target)
    if not stream.events or stream.events[-1].data.strip() != b"[DONE]":
        raise CheckFailed("no_done")
    unreadable = sum(1 for event in stream.events[:-1] if not isinstance(event.body, dict))
    if unreadable:
        raise CheckFailed("unreadable_events", count=unreadable)


async def says_why_it_ended(target: Target) -> None:
    stream = await streamed(target)
    if len(stream.finishes) != 1:
        raise CheckFailed("finishes", count=len(stream.finishes))
    finished = next(i for i, event in enumerate(stream.chunks) if first_choice(event.body).get("finish_reason"))
    if any(event.text for event in stream.chunks[finished + 1 :]):
        raise CheckFailed("text_after_finish")


async def has_the_shape_of_chunks(target: Target) -> None:
    chunks = (await streamed(target)).chunks
    if not chunks:
        raise CheckFailed("no_pieces", events=0)
    bodies = [event.body for event in chunks]
    rules = {
        "id": len({body.get("id") for body in bodies}) == 1 and isinstance(bodies[0].get("id"), str),
        "object": all(body.get("object") == "chat.completion.chunk" for body in bodies),
        "created": all(isinstance(body.get("created"), int) for body in bodies),
        "model": all(isinstance(body.get("model"), str) and body["model"] for body in bodies),
        "choices[0].delta.role": chunks[0].delta.get("role") == "assistant",
    }
    faults = [name for name, holds in rules.items() if not holds]
    if faults:
        raise CheckFailed("wrong_shape", fields=", ".join(faults))


async def streamed(target: Target, **fields: object) -> Stream:
    """Return a streamed answer.

    Raises:
        CheckFailed: The answer is not a stream.
    """
    stream = await target.stream(target.chat("Tell me about the four seasons in Korea.", **fields))
    if not stream.is_stream:
        content_type = stream.reply.headers.get("content-type", "-")
        raise CheckFailed("not_a_stream", status=stream.reply.status, type=content_type, message=stream.reply.message)
    return stream


CHECKS = (
    Check("streaming", "comes_piece_by_piece", comes_piece_by_piece),
    Check("streaming", "ends_with_done", ends_with_done),
    Check("streaming", "says_why_it_ended", says_why_it_ended),
    Check("streaming", "has_the_shape_of_chunks", has_the_shape_of_chunks),
)
