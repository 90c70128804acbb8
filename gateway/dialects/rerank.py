"""Cohere's and Jina's rerank: bytes to a `Rerank`, results to bytes. Pure: no I/O, no clock.

Both APIs have the same request. The answer has the fields of both.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
import orjson
from msgspec import Meta, Raw, Struct

from gateway.chat.rerank import MAX_DOCUMENTS, Ranked, Rerank
from gateway.dialects.dialect import ErrorForm, OpenAiErrors
from gateway.dialects.json_body import STEP, Steps, completed, decode_fields, explain, has_too_many_members, render_list
from gateway.dialects.json_text import json_value
from gateway.errors import GatewayError, InvalidJson, InvalidRequest, RequestTooLarge, UnsupportedParameter

MAX_BODY = 8 * 1024 * 1024
"""Maximum size of a request in bytes: 2,048 documents of 4 KiB."""

_Text = Annotated[str, Meta(min_length=1)]
_Count = Annotated[int, Meta(ge=1, le=10_000_000)]


class TextDocument(Struct, frozen=True):
    """A document as an object. Fields other than the text are ignored."""

    text: str


class RerankBody(Struct, frozen=True, kw_only=True):
    """Body of a request."""

    model: _Text
    query: _Text
    documents: Annotated[list[str | TextDocument], Meta(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: _Count | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: _Count | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=10_000_000)] | None = None
    instruction: str | None = None
    rank_fields: Any = None


class _Shape(RerankBody, frozen=True, kw_only=True):
    """The same, with documents that are decoded one by one."""

    documents: Annotated[list[Raw], Meta(min_length=1, max_length=MAX_DOCUMENTS)]  # type: ignore[assignment]


_JSON_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_shapes = msgspec.json.Decoder(_Shape)
_document = msgspec.json.Decoder(str | TextDocument)


class RerankCall(Struct, frozen=True, gc=False):
    """A rerank request, and the form in which its client wants the results."""

    rerank: Rerank
    form: "RerankForm"


class RerankForm(Struct, OpenAiErrors, frozen=True, gc=False):
    """The results, with the documents if the client asks for them."""

    endpoint: ClassVar[str] = "rerank"

    model: str
    documents: list[str] | None

    def answer(self, id: str, results: Sequence[Ranked], prompt_tokens: int) -> Steps[list[bytes]]:
        """Render the answer in steps, as its parts: `usage` as at Jina and vLLM, `meta` as at Cohere."""
        head = b'{"id":"rerank-%b","model":%b,"results":[' % (id.encode(), json_value(self.model))
        tail = (
            b'],"usage":{"prompt_tokens":%d,"total_tokens":%d},'
            b'"meta":{"billed_units":{"search_units":1},"tokens":{"input_tokens":%d}}}'
        ) % (prompt_tokens, prompt_tokens, prompt_tokens)
        return render_list(head, (self._result(*result) for result in results), tail)

    def _result(self, document: int, score: float) -> bytes:
        head = b'{"index":%d,"relevance_score":%b' % (document, msgspec.json.encode(score))
        if self.documents is None:
            return head + b"}"
        return b'%b,"document":{"text":%b}}' % (head, json_value(self.documents[document]))


class CohereRerank:
    """`POST /v1/rerank` and `/v2/rerank`."""

    endpoint = RerankForm.endpoint
    errors: ErrorForm = OpenAiErrors()
    needs_media_type = True

    def parse(self, body: bytes, check_model: Callable[[str], object]) -> RerankCall:
        """Parse a request. `check_model` is called with the name of the model, and may raise.

        Raises:
            GatewayError: the request is invalid, too large, or has something that is not served.
        """
        return completed(self.parse_steps(body, check_model))

    def parse_steps(self, body: bytes, check_model: Callable[[str], object]) -> Steps[RerankCall]:
        """Do the same in steps of some milliseconds."""
        if len(body) > MAX_BODY:
            raise RequestTooLarge(f"A rerank request may have at most {MAX_BODY} bytes.")
        if (yield from has_too_many_members(body)):
            raise RequestTooLarge("The request has too many JSON values or escapes.")
        try:
            orjson.loads(body)  # msgspec skips fields that are not in its types without checking them
        except orjson.JSONDecodeError:
            raise InvalidJson("The body is not valid JSON.") from None
        yield
        try:
            shape = decode_fields(_shapes, body)
        except _JSON_ERRORS as error:
            raise _json_error(error) from None
        check_model(shape.model)
        if shape.rank_fields is not None:
            raise UnsupportedParameter(
                "'rank_fields' is not supported by this gateway. Join the fields into the text of the document.",
                param="rank_fields",
            )
        documents: list[str] = []
        size = 0
        for index, raw in enumerate(shape.documents):
            documents.append(_text(raw, index))
            size += len(documents[-1])
            if size > STEP:
                size = 0
                yield
        rerank = Rerank(
            model=shape.model,
            query=shape.query,
            documents=documents,
            top_n=shape.top_n,
            max_tokens_per_doc=shape.max_tokens_per_doc,
            truncate_prompt_tokens=shape.truncate_prompt_tokens,
            instruction=shape.instruction,
        )
        return RerankCall(rerank, RerankForm(shape.model, documents if shape.return_documents else None))


def _text(raw: Raw, index: int) -> str:
    try:
        document = _document.decode(raw)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        raise explain(f"{reason} - at `$.documents[{index}]{path.rstrip('`')}`") from None
    except _JSON_ERRORS as error:
        raise _json_error(error) from None
    text = document if isinstance(document, str) else document.text
    if not text:
        raise InvalidRequest(f"'documents[{index}]' is empty. Leave it out.", param=f"documents[{index}]")
    return text


def _json_error(error: Exception) -> GatewayError:
    if not isinstance(error, msgspec.ValidationError):
        return InvalidJson(
            "The body is nested too deeply." if isinstance(error, RecursionError) else "The body is not valid JSON."
        )
    found = explain(str(error))
    if found.param == "documents":
        return InvalidRequest(f"'documents' must be a list of 1 to {MAX_DOCUMENTS} documents.", param="documents")
    return found
