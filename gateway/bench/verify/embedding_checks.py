"""Checks of embeddings, where the server has a model for them."""

import base64
import math
import struct
from typing import Any

from gateway.bench.verify.error_checks import require_error
from gateway.bench.verify.outcome import Check, CheckFailed, CheckSkipped, Reason
from gateway.bench.verify.target import Reply, Target

PATH = "/v1/embeddings"
TEXTS = ["벚꽃이 활짝 핀 봄날", "a cold day in winter"]
MOST_TRIED = 32
TOLERANCE = 0.02
"""Greatest difference of two vectors of the same text, as a share of their length: batches of other
sizes are computed in another order."""


async def vectors(target: Target) -> Reason:
    model = await _model(target)
    reply = await target.ask({"model": model, "input": TEXTS}, PATH)
    if reply.status != 200:
        raise CheckFailed("refused", status=reply.status, message=reply.message)
    found = _vectors(reply)
    if len(found) != len(TEXTS):
        raise CheckFailed("vectors_missing", count=len(found), wanted=len(TEXTS))
    widths = {len(vector) for vector in found}
    if len(widths) > 1 or not all(math.isfinite(number) for vector in found for number in vector):
        raise CheckFailed("wrong_vectors")
    if not any(found[0]) or _distance(found[0], found[1]) == 0:
        raise CheckFailed("same_vectors")
    return Reason("vectors", {"model": model, "width": widths.pop()})


async def order_of_vectors(target: Target) -> None:
    model = await _model(target)
    there = await _embedded(target, model, TEXTS)
    back = await _embedded(target, model, TEXTS[::-1])
    alone = await _embedded(target, model, TEXTS[0])
    if _distance(there[0], back[1]) > TOLERANCE or _distance(there[0], alone[0]) > TOLERANCE:
        raise CheckFailed("vectors_out_of_order")


async def base64_vectors(target: Target) -> None:
    """openai-python asks for this form unless it is told otherwise."""
    model = await _model(target)
    plain = await _embedded(target, model, TEXTS[0], encoding_format="float")
    coded = await _embedded(target, model, TEXTS[0], encoding_format="base64")
    if _distance(plain[0], coded[0]) > TOLERANCE:
        raise CheckFailed("base64_differs")


async def wrong_input(target: Target) -> None:
    reply = await target.ask({"model": await _model(target), "input": {"text": "no"}}, PATH)
    require_error(target, reply, 400, 422, codes=("invalid_value",))


async def _embedded(target: Target, model: str, texts: Any, **fields: str) -> list[list[float]]:
    reply = await target.ask({"model": model, "input": texts, **fields}, PATH)
    if reply.status != 200:
        raise CheckFailed("refused", status=reply.status, message=reply.message)
    found = _vectors(reply)
    wanted = len(texts) if isinstance(texts, list) else 1
    if len(found) != wanted or len({len(vector) for vector in found}) != 1:
        raise CheckFailed("wrong_vectors")
    return found


def _vectors(reply: Reply) -> list[list[float]]:
    data = reply.body.get("data") if isinstance(reply.body, dict) else None
    items = [item for item in data if isinstance(item, dict)] if isinstance(data, list) else []
    items.sort(key=lambda item: item.get("index", 0))
    return [vector for item in items if (vector := _numbers(item.get("embedding")))]


def _numbers(value: object) -> list[float]:
    if isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
        except ValueError:
            return []
        return list(struct.unpack(f"<{len(data) // 4}f", data)) if len(data) % 4 == 0 else []
    if not isinstance(value, list) or not all(isinstance(number, int | float) for number in value):
        return []
    return [float(number) for number in value]


def _distance(one: list[float], other: list[float]) -> float:
    """Return the distance of two vectors as a share of the first one's length."""
    if len(one) != len(other):
        return math.inf
    return math.dist(one, other) / (math.hypot(*one) or 1.0)


async def _model(target: Target) -> str:
    """Return a model that gives embeddings; it is looked for once.

    Raises:
        CheckSkipped: There is none.
    """
    if target.embedding_model is None:
        target.embedding_model = await _found(target) or ""
    if not target.embedding_model:
        raise CheckSkipped("no_embedding_model")
    return target.embedding_model


async def _found(target: Target) -> str | None:
    for item in target.listed[:MOST_TRIED]:
        name = str(item["id"])
        if target.kind == "ollama" and not await _is_for_embeddings(target, name):
            continue  # an Ollama would load each model that is tried
        if (await target.ask({"model": name, "input": "probe"}, PATH)).status == 200:
            return name
    return None


async def _is_for_embeddings(target: Target, name: str) -> bool:
    reply = await target.ask({"model": name}, "/api/show")
    capabilities = reply.body.get("capabilities") if isinstance(reply.body, dict) else None
    return isinstance(capabilities, list) and "embedding" in capabilities


CHECKS = tuple(
    Check("embeddings", run.__name__, run) for run in (vectors, order_of_vectors, base64_vectors, wrong_input)
)
