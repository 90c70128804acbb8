"""Check that as many requests as wanted are answered at once, and whether they share the model."""

import asyncio
from itertools import pairwise

from gateway.bench.overlap import classify, generating_at_once
from gateway.bench.results import RequestRecord
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
    average = at_once(streams)
    one = alone.ended - alone.sent if isinstance(alone, Stream) else 0.0
    figures = {"users": target.users, "seconds": f"{took:.2f}", "at_once": f"{average or 0:.1f}", "alone": f"{one:.2f}"}
    return Reason(classify(average, target.users), figures)


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


def at_once(streams: list[Stream]) -> float | None:
    """Return how many answers were generated at the same time on average, as `gateway bench` computes it."""
    return generating_at_once([_record(index, stream) for index, stream in enumerate(streams) if stream.pieces])


def _record(index: int, stream: Stream) -> RequestRecord:
    times = [event.at for event in stream.pieces]
    gaps = tuple(later - earlier for earlier, later in pairwise(times))
    first = times[0] - stream.sent
    return RequestRecord(index, stream.sent, stream.sent, times[-1], stream.ended, ttft=first, itl=gaps)


CHECKS = (Check("concurrency", "answers_at_once", answers_at_once),)
