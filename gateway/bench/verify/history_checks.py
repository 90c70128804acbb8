"""Checks that a server gives the model the whole conversation."""

from itertools import pairwise
from typing import Any

from gateway.bench.verify.outcome import Check, CheckFailed, CheckSkipped, Reason
from gateway.bench.verify.target import Target

WORDS = 60
"""Words of each earlier turn. Each is about a token or more, so half as many have to be added."""

CODE, MARK = "4821-97", "QX7K"
FACT = f"(note {MARK}) The number of my locker is {CODE}. Please remember it."
QUESTION = "What is the number of my locker? Answer with the number alone."


async def counts_earlier_turns(target: Target) -> Reason:
    """Compare the prompt tokens of one question with and without earlier turns.

    The model does not matter, so this also holds for one of random weights.
    """
    counts = []
    for turns in (0, 1, 2):
        reply = await target.ask(target.chat(_conversation(turns)))
        if reply.status != 200:
            raise CheckFailed("refused", status=reply.status, message=reply.message)
        count = reply.usage.get("prompt_tokens")
        if not isinstance(count, int) or count <= 0:
            raise CheckSkipped("no_prompt_tokens")
        counts.append(count)
    shown = " → ".join(str(count) for count in counts)
    if any(later - earlier < WORDS // 2 for earlier, later in pairwise(counts)):
        raise CheckFailed("history_not_counted", counts=shown, words=WORDS // 2)
    return Reason("history_counted", {"counts": shown})


def _conversation(turns: int) -> list[dict[str, Any]]:
    """Return a question after so many earlier turns, each of `WORDS` words that differ."""
    messages = []
    for turn in range(turns):
        text = " ".join(str(100 + (turn * 37 + number * 7) % 900) for number in range(WORDS - 20))
        messages += [
            {"role": "user", "content": f"Numbers: {text}"},
            {"role": "assistant", "content": " ".join(["noted", "and", "kept", "here", "."] * 4)},
        ]
    return [*messages, {"role": "user", "content": "How many numbers were there?"}]


async def recalls_a_fact(target: Target) -> Reason:
    """Ask for a fact of an earlier turn.

    A model that cannot find the fact even in the same message proves nothing, and neither does one
    that repeats its prompt: `MARK` is beside the fact and no answer to the question.
    """
    told = [
        {"role": "user", "content": FACT},
        {"role": "assistant", "content": "I will."},
        {"role": "user", "content": QUESTION},
    ]
    reply = await target.ask(target.chat(told, max_tokens=300))
    if reply.status != 200:
        raise CheckFailed("refused", status=reply.status, message=reply.message)
    if CODE in reply.text:
        return Reason("recalled")
    control = await target.ask(target.chat(f"{FACT}\n\n{QUESTION}", max_tokens=300))
    if CODE in control.text and MARK not in control.text:
        raise CheckFailed("not_recalled")
    raise CheckSkipped("cannot_recall")


CHECKS = (
    Check("history", "counts_earlier_turns", counts_earlier_turns),
    Check("history", "recalls_a_fact", recalls_a_fact),
)
