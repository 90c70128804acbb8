"""Check that as many requests as wanted are answered at once, and whether they share the model."""

import asyncio

from gateway.bench.verify.outcome import Check, CheckFailed, Reason
from gateway.bench.verify.target import ServerUnreachable, Stream, Target

TOKENS = 32


async def answers_at_once(target: Target) -> Reason:
    alone = await _ask(target, 0)
    began = asyncio.get_running_loop().time()
    answers = await asyncio.gather(*[_ask(target, number) for number in range(1, target.users + 1)])
    took = asyncio.get_running_loop().time() - began
    faults = [fault for answer in answers if (fault := _fault(answer))]
    if faults:
        raise CheckFailed("not_all_answered", answered=target.users - len(faults), users=target.users, fault=faults[0])
    streams = [answer for answer in answers if isinstance(answer, Stream)]
    at_once = most_at_once(streams)
    verdict = "serial" if at_once == 1 else "batched" if at_once >= target.users else "partly_batched"
    one = alone.ended - alone.sent if isinstance(alone, Stream) else 0.0
    return Reason(verdict, {"users": target.users, "seconds": f"{took:.2f}", "at_once": at_once, "alone": f"{one:.2f}"})


async def _ask(target: Target, number: int) -> Stream | str:
    try:
        return await target.stream(target.chat(f"Question {number}: count to {number + 20}.", max_tokens=TOKENS))
    except ServerUnreachable as error:
        return str(error)


def _fault(answer: Stream | str) -> str:
    """Return what is wrong with an answer; empty if nothing is."""
    if isinstance(answer, str):
        return answer
    if not answer.is_stream:
        return f"{answer.reply.status}: {answer.reply.message}"
    if not answer.events or answer.events[-1].data.strip() != b"[DONE]":
        return "no [DONE]"
    return "" if answer.finishes else "no finish_reason"


def most_at_once(streams: list[Stream]) -> int:
    """Return how many answers were in progress at the same time, from the first piece to the last.

    Answers that follow each other do not overlap, even if the last pieces of one and the first
    of the next arrive together.
    """
    turns = [
        turn
        for stream in streams
        if stream.pieces
        for turn in ((stream.pieces[0].at, 1, 1), (stream.pieces[-1].at, 0, -1))
    ]
    running = most = 0
    for _, _, change in sorted(turns):
        running += change
        most = max(most, running)
    return max(1, most)


CHECKS = (Check("concurrency", "answers_at_once", answers_at_once),)
