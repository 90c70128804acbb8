"""Embeddings as a vLLM with a pooling model makes them (vLLM 0.32, `--runner pooling`). Pure."""

import secrets
import time
from dataclasses import dataclass
from typing import Any

from gateway.simulate.options import Model, Options
from gateway.simulate.text import count_tokens
from gateway.simulate.vectors import Vector, embed, packed, unit
from gateway.simulate.vllm.validation import Flaw, VllmApiError, flaw, invalid, refused

FORMATS = ("float", "base64", "bytes", "bytes_only")


@dataclass(frozen=True, slots=True)
class EmbeddingJob:
    """One request. `texts` may be token ids written out."""

    model: Model
    texts: tuple[str, ...]
    tokens: int
    in_base64: bool
    dimensions: int | None

    def answer(self, name: str) -> dict[str, Any]:
        """The body, under the model's `name`."""
        data = [
            {"index": i, "object": "embedding", "embedding": self._shown(text)} for i, text in enumerate(self.texts)
        ]
        details = dict.fromkeys(("prompt_tokens_details", "completion_tokens_details"))
        usage = {"prompt_tokens": self.tokens, "total_tokens": self.tokens, "completion_tokens": 0, **details}
        head = {"id": f"embd-{secrets.token_hex(8)}", "object": "list", "created": int(time.time()), "model": name}
        return {**head, "data": data, "usage": usage}

    def _shown(self, text: str) -> Vector | str:
        vector = embed(text, self.model.embedding)
        if self.dimensions is not None:
            vector = unit(vector[: self.dimensions])
        return packed(vector) if self.in_base64 else vector


def embedding_job(body: dict[str, Any], model: Model, options: Options) -> EmbeddingJob:
    """The job of a body for `/v1/embeddings`. Raises ApiError in vLLM's words."""
    asked, form, wanted = body.get("input"), body.get("encoding_format") or "float", body.get("dimensions")
    if "input" not in body:
        raise invalid(flaw("missing", "body.input", "Field required", body))
    flaws: list[Flaw] = []
    if not isinstance(asked, (str, list)):
        flaws.append(flaw("list_type", "body.input", "Input should be a valid list", asked))
    if form not in FORMATS:
        *others, last = (repr(word) for word in FORMATS)
        expected = f"{', '.join(others)} or {last}"
        flaws.append(
            flaw("literal_error", "body.encoding_format", f"Input should be {expected}", form, expected=expected)
        )
    if flaws:
        raise invalid(*flaws)
    if body.get("model") and body["model"] not in [served.name for served in options.served]:
        raise VllmApiError(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
    _check_dimensions(wanted, model)
    texts = _texts(asked)
    if not texts:
        raise refused("You must pass at least one prompt")
    if "" in texts:
        raise refused("The decoder prompt cannot be empty")
    return EmbeddingJob(model, texts, sum(_tokens(text, model) for text in texts), form == "base64", wanted)


def _check_dimensions(wanted: int | None, model: Model) -> None:
    if wanted is None:
        return
    if not model.matryoshka:
        words = f"does not support Matryoshka embeddings; dimensions must be unset (received dimensions={wanted})."
        raise refused(f"Model '{model.name}' {words}")
    if not 0 < wanted <= model.embedding:
        raise refused(f"Model '{model.name}' only supports dimensions in range [1, {model.embedding}], got {wanted}.")


def _texts(asked: Any) -> tuple[str, ...]:
    if isinstance(asked, str):
        return (asked,)
    if asked and all(isinstance(item, int) for item in asked):
        asked = [asked]
    return tuple(item if isinstance(item, str) else " ".join(map(str, item)) for item in asked)


def _tokens(text: str, model: Model) -> int:
    tokens = count_tokens(text)
    if tokens > model.context_length:
        most = model.context_length
        head = f"This model's maximum context length is {most} tokens. However, your prompt contains at least {most + 1} input tokens, "
        tail = "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
        raise refused(head + tail, "input_tokens", value=most + 1)
    return tokens
