"""Embeddings of a vLLM with a pooling model (vLLM 0.32, `--runner pooling`). Pure."""

import secrets
import time
from dataclasses import dataclass
from typing import Any

from gateway.simulate.options import Model, Options
from gateway.simulate.text import count_tokens
from gateway.simulate.vectors import Vector, embed, packed, unit
from gateway.simulate.vllm.errors import ErrorDetail, VllmApiError, bad_request, error_detail, validation_failed

FORMATS = ("float", "base64", "bytes", "bytes_only")


@dataclass(frozen=True, slots=True)
class EmbeddingJob:
    """One embedding request. Token ids are joined to a text of their numbers."""

    model: Model
    texts: tuple[str, ...]
    tokens: int
    in_base64: bool
    dimensions: int | None

    def answer(self, name: str) -> dict[str, Any]:
        """Return the response body, with `name` as the model."""
        data = [
            {"index": i, "object": "embedding", "embedding": self._encoded(text)} for i, text in enumerate(self.texts)
        ]
        details = dict.fromkeys(("prompt_tokens_details", "completion_tokens_details"))
        usage = {"prompt_tokens": self.tokens, "total_tokens": self.tokens, "completion_tokens": 0, **details}
        head = {"id": f"embd-{secrets.token_hex(8)}", "object": "list", "created": int(time.time()), "model": name}
        return {**head, "data": data, "usage": usage}

    def _encoded(self, text: str) -> Vector | str:
        vector = embed(text, self.model.embedding)
        if self.dimensions is not None:
            vector = unit(vector[: self.dimensions])
        return packed(vector) if self.in_base64 else vector


def embedding_job(body: dict[str, Any], model: Model, options: Options) -> EmbeddingJob:
    """Parse a body of `/v1/embeddings`.

    Raises:
        VllmApiError: the request is not valid; the message is vLLM's.
    """
    texts_or_ids, form, dimensions = body.get("input"), body.get("encoding_format") or "float", body.get("dimensions")
    if "input" not in body:
        raise validation_failed(error_detail("missing", "body.input", "Field required", body))
    errors: list[ErrorDetail] = []
    if not isinstance(texts_or_ids, (str, list)):
        errors.append(error_detail("list_type", "body.input", "Input should be a valid list", texts_or_ids))
    if form not in FORMATS:
        *others, last = (repr(word) for word in FORMATS)
        expected = f"{', '.join(others)} or {last}"
        message = f"Input should be {expected}"
        errors.append(error_detail("literal_error", "body.encoding_format", message, form, expected=expected))
    if errors:
        raise validation_failed(*errors)
    if body.get("model") and body["model"] not in [served.name for served in options.served]:
        raise VllmApiError(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
    _check_dimensions(dimensions, model)
    texts = _texts(texts_or_ids)
    if not texts:
        raise bad_request("You must pass at least one prompt")
    if "" in texts:
        raise bad_request("The decoder prompt cannot be empty")
    return EmbeddingJob(model, texts, sum(text_tokens(text, model) for text in texts), form == "base64", dimensions)


def _check_dimensions(dimensions: int | None, model: Model) -> None:
    if dimensions is None:
        return
    if not model.matryoshka:
        words = f"does not support Matryoshka embeddings; dimensions must be unset (received dimensions={dimensions})."
        raise bad_request(f"Model '{model.name}' {words}")
    if not 0 < dimensions <= model.embedding:
        raise bad_request(
            f"Model '{model.name}' only supports dimensions in range [1, {model.embedding}], got {dimensions}."
        )


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if value and all(isinstance(item, int) for item in value):
        value = [value]
    return tuple(item if isinstance(item, str) else " ".join(map(str, item)) for item in value)


def text_tokens(text: str, model: Model) -> int:
    tokens = count_tokens(text)
    if tokens > model.context_length:
        most = model.context_length
        message = (
            f"This model's maximum context length is {most} tokens. "
            f"However, your prompt contains at least {most + 1} input tokens, "
            "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
        )
        raise bad_request(message, "input_tokens", value=most + 1)
    return tokens
