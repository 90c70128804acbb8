"""The sections `tiers`, `auto`, `embeddings` and `rerankers` of the settings document. Pure."""

from typing import Annotated

from pydantic import BeforeValidator, Field, JsonValue

from gateway.chat.answer import ReasoningField
from gateway.config.document_backends import LimitOverridesDocument
from gateway.config.field_types import (
    Count,
    CountOrZero,
    DocumentSection,
    Fallback,
    Flag,
    ModelName,
    Pixels,
    PublicName,
    empty_if_none,
)
from gateway.config.settings import Priority, Task


class AliasDocument(DocumentSection):
    """Another name for a tier, with a priority of its own."""

    name: PublicName = Field(description="The name; `*` matches any name that nothing else uses.")
    priority: Priority = Field(
        default="interactive",
        description="interactive or batch; batch requests wait behind interactive ones. Default: interactive.",
    )
    listed: Flag = Field(default=True, description="Whether GET /v1/models lists it. Default: true.")


class ParamsDocument(DocumentSection):
    """Changes that a tier makes to a request's parameters."""

    default: dict[str, JsonValue] = Field(
        default_factory=dict, description="Values used if the client does not set them. Default: {}."
    )
    force: dict[str, JsonValue] = Field(
        default_factory=dict, description="Values used whatever the client sends. Default: {}."
    )
    drop: tuple[str, ...] = Field(default=(), description="Parameters that are never sent upstream. Default: [].")


class ImagesDocument(DocumentSection):
    """Changes that a tier makes to a request's images."""

    max_pixels: Pixels | None = Field(
        default=None,
        description="Pixels to which larger images are scaled down before they are sent, from 1024 to 64000000. "
        "Default: none, images are sent as they come.",
    )


def _alias(value: object) -> object:
    return value if isinstance(value, dict) else {"name": value}


class TierDocument(DocumentSection):
    """A class of service: a model on each backend, and how requests for it are treated."""

    models: dict[str, ModelName] = Field(
        description="The model's name on each backend, by the name of the backend. Required.", min_length=1
    )
    aliases: tuple[
        Annotated[AliasDocument, BeforeValidator(_alias, json_schema_input_type=AliasDocument | str)], ...
    ] = Field(default=(), description="Other names that clients may send as the model. Default: [].")
    backend: str | None = Field(
        default=None,
        description="Pins the tier to this backend, so that no roll-out moves it. "
        "Default: not pinned: llm_backend serves it, and roll-outs move it.",
    )
    fallback: Fallback = Field(
        default=False,
        description="Backend that serves if the active one cannot, up to the first token of the answer: its name, "
        "or true for the next one under models. Default: false.",
    )
    warm: Flag = Field(
        default=False,
        description="Whether the tier's models on backends of kind ollama are loaded at the start, one after the "
        "other. Default: false.",
    )
    max_tokens: Count | None = Field(
        default=None, description="Maximum tokens of an answer, whatever the client asks for. Default: no limit."
    )
    reasoning_field: ReasoningField = Field(
        default="reasoning",
        description="Field of chat completions with the thoughts: reasoning, reasoning_content or both. "
        "Default: reasoning.",
    )
    params: ParamsDocument = Field(
        default_factory=ParamsDocument, description="Changes made to a request's parameters."
    )
    images: ImagesDocument = Field(
        default_factory=ImagesDocument, description="Changes made to a request's images. Default: none."
    )
    limits: dict[str, Annotated[LimitOverridesDocument, BeforeValidator(empty_if_none)]] = Field(
        default_factory=dict,
        description="Limits and timeouts that this tier overrides, by the name of the backend. Default: {}.",
    )


class AutoRuleDocument(DocumentSection):
    """One rule for the model name `auto`; it holds if all its conditions do."""

    tier: str = Field(description="Name of the tier that the rule selects. Required.")
    task: Task | None = Field(
        default=None, description="Value of the header x-gateway-task: simple, medium or complex. Default: any."
    )
    images: Flag | None = Field(
        default=None, description="true: the request has images; false: it does not. Default: either."
    )
    tools: Flag | None = Field(
        default=None, description="true: the request offers tools; false: it does not. Default: either."
    )
    longer_than: CountOrZero | None = Field(
        default=None,
        description="Number of characters that the text of all messages together must exceed; images do not count. "
        "Default: any length.",
    )


class RerankerDocument(DocumentSection):
    """A reranker: pinned, never moved by a roll-out."""

    backend: str = Field(description="Name of the backend that serves it, which is of kind vllm. Required.")
    model: ModelName = Field(description="The model's name on that backend. Required.")


class EmbeddingDocument(DocumentSection):
    """An embedding model: pinned, never moved by a roll-out."""

    backend: str = Field(description="Name of the backend that serves it. Required.")
    model: ModelName = Field(description="The model's name on that backend. Required.")
    warm: Flag = Field(
        default=False,
        description="Whether it is loaded at the start, if the backend is of kind ollama. Default: false.",
    )
