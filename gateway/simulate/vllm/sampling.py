"""vLLM's checks of sampling parameters and structured outputs, on a validated body. Pure."""

import json
import math
import re
from typing import Any

from gateway.simulate.json_values import instance, matching
from gateway.simulate.vllm.errors import bad_request

MAX_CHOICES = 16384
MAX_LOGPROBS = 20
VOCABULARY = 151_936  # of Qwen3
SCHEMA_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_NO_CONSTRAINT = {
    "json": None,
    "regex": None,
    "choice": None,
    "grammar": None,
    "json_object": None,
    "disable_any_whitespace": False,
    "disable_additional_properties": False,
    "whitespace_pattern": None,
    "structural_tag": None,
    "_backend": None,
    "_backend_was_auto": False,
}


def check_ranges(body: dict[str, Any], max_model_len: int) -> None:
    """Check the ranges of the sampling parameters; `max_model_len` is in tokens.

    Raises:
        VllmApiError: a parameter is out of range.
    """
    key = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    asked = body.get(key)
    if asked is not None and asked > max_model_len:
        message = (
            f"{key}={asked} cannot be greater than max_model_len={max_model_len}. Please request fewer output tokens."
        )
        raise bad_request(message, key, value=asked)
    choices = 1 if body.get("n") is None else body["n"]
    if choices < 1:
        raise bad_request(f"n must be at least 1, got {choices}.")
    if choices > MAX_CHOICES:
        more = "To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable."
        raise bad_request(f"n must be at most {MAX_CHOICES}, got {choices}. {more}")
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2 <= (body.get(name) or 0) <= 2:
            raise bad_request(f"{name} must be in [-2, 2], got {body[name]}.")
    _check_sampling(body)
    ids = [number for number in body.get("stop_token_ids") or () if not 0 <= number < VOCABULARY]
    if ids:
        message = f"token_id(s) {ids} in stop_token_ids contain out-of-vocab token ids. Vocabulary size: {VOCABULARY}"
        raise bad_request(message, "stop_token_ids", value=ids)
    if asked is not None and asked < 1:
        raise bad_request(f"max_tokens must be at least 1, got {asked}.", "max_tokens", value=asked)
    if asked is not None and (body.get("min_tokens") or 0) > asked:
        raise bad_request(f"min_tokens must be less than or equal to max_tokens={asked}, got {body['min_tokens']}.")
    stop = body.get("stop")
    if stop == "" or (isinstance(stop, list) and "" in stop):
        raise bad_request("stop cannot contain an empty string.")
    if choices > 1 and body.get("temperature") == 0:
        raise bad_request(f"n must be 1 when using greedy sampling, got {choices}.")
    top = body.get("top_logprobs") or 0
    if top > MAX_LOGPROBS:
        raise bad_request(
            f"Requested sample logprobs of {top}, which is greater than max allowed: {MAX_LOGPROBS}",
            "logprobs",
            value=top,
        )


def _check_sampling(body: dict[str, Any]) -> None:
    penalty = body.get("repetition_penalty")
    if penalty is not None and penalty <= 0:
        raise bad_request(f"repetition_penalty must be greater than zero, got {penalty}.")
    temperature = body.get("temperature")
    if temperature is not None and not 0 <= temperature <= 2:
        should = (
            "a finite number" if not math.isfinite(temperature) else "non-negative" if temperature < 0 else "in [0, 2]"
        )
        raise bad_request(f"temperature must be {should}, got {temperature}.", "temperature", value=temperature)
    top_p = body.get("top_p")
    if top_p is not None and not 0 < top_p <= 1:
        raise bad_request(f"top_p must be in (0, 1], got {top_p}.", "top_p", value=top_p)
    top_k = body.get("top_k")
    if top_k is not None and top_k < -1:
        raise bad_request(f"top_k must be 0 (disable), or at least 1, got {top_k}.")
    min_p = body.get("min_p")
    if min_p is not None and not 0 <= min_p <= 1:
        raise bad_request(f"min_p must be in [0, 1], got {min_p}.")
    _check_bias(body.get("logit_bias") or {})


def _check_bias(bias: dict[str, Any]) -> None:
    wrong = [key for key in bias if not key.lstrip("-").isdigit()]
    if wrong:
        raise bad_request(
            f"logit_bias contains key(s) that cannot be converted to integer token IDs: {wrong}",
            "logit_bias",
            value=wrong,
        )
    far = [int(key) for key in bias if not 0 <= int(key) < VOCABULARY]
    if far:
        message = f"token_id(s) {far} in logit_bias contain out-of-vocab token ids. Vocabulary size: {VOCABULARY}"
        raise bad_request(message, "logit_bias", value=far)


def constrained(outputs: dict[str, Any] | None) -> str | None:
    """Return a text that follows `structured_outputs`; None without it.

    Raises:
        VllmApiError: it has no constraint, or several, or one that cannot be compiled.
    """
    if outputs is None:
        return None
    kinds = [name for name in ("json", "regex", "choice", "grammar") if outputs.get(name) is not None]
    if len(kinds) != 1:
        count = "multiple" if kinds else "none"
        raise bad_request(f"You must use one kind of structured outputs constraint but {count} are specified: {kinds}")
    value = outputs[kinds[0]]
    match kinds[0]:
        case "json":
            return json.dumps(instance(json.loads(value) if isinstance(value, str) else value, "x"))
        case "choice":
            return str(value[0])
        case "regex":
            try:
                return matching(value)
            except re.error as exc:
                raise bad_request(f"Failed to transform regex into a grammar: {exc}") from exc
    found = re.search(r'"([^"]*)"', value)
    if "::=" not in value or found is None:
        raise bad_request("Invalid grammar specification.")
    return found[1]


def check_schema(response_format: dict[str, Any]) -> None:
    """Check that a grammar can be made for a `response_format`.

    Raises:
        VllmApiError: its JSON Schema is missing or not supported.
    """
    if response_format.get("type") != "json_schema":
        return
    schema = response_format["json_schema"].get("schema")
    if schema is None:
        raise bad_request(
            f"You must use one kind of structured outputs constraint but none are specified: {_NO_CONSTRAINT}"
        )
    kind = schema.get("type")
    if isinstance(kind, str) and kind not in SCHEMA_TYPES:
        raise bad_request(f'Failed to transform json schema into a grammar: Unsupported type "{kind}"')
