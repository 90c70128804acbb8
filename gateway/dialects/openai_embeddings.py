"""OpenAI's embeddings: bytes to an `Embedding`, vectors to bytes. Pure: no I/O, no clock."""

import msgspec
import orjson

from gateway.chat.embedding import MAX_TEXTS, Embedding, EncodedVector
from gateway.dialects.json_body import MAX_NESTING_MARKS, explain
from gateway.errors import InvalidJson, InvalidRequest, RequestTooLarge, UnsupportedParameter

_decoder = msgspec.json.Decoder(Embedding)


def parse_embedding(body: bytes, max_text_body: int) -> Embedding:
    """Parse the request in `body`, of any length, because batches of texts are its purpose.

    Raises:
        InvalidJson: the body is not JSON, or not a JSON object.
        InvalidRequest: a field is missing, of the wrong type or out of range; `param` is its name.
        UnsupportedParameter: the input consists of token numbers instead of text.
        RequestTooLarge: something other than text makes the body large.
    """
    try:
        embedding = _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidJson("The body is not valid JSON.") from None
    except RecursionError:
        raise InvalidJson("The body is nested too deeply.") from None
    if (
        len(body) > max_text_body
        and _marks(body) - sum(_marks(text.encode()) for text in embedding.texts) > MAX_NESTING_MARKS
    ):
        raise RequestTooLarge("The request has too many JSON arrays and objects.")
    try:  # msgspec skips fields that are not in its types without checking them
        orjson.loads(body)
    except orjson.JSONDecodeError:
        raise InvalidJson("The body is not valid JSON.") from None
    return embedding


def _marks(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _explain(text: str) -> InvalidRequest:
    error = explain(text)
    if error.param is None or not error.param.startswith("input"):
        return error
    if error.param != "input" and ("got `int`" in text or "got `array`" in text):
        return UnsupportedParameter(
            "'input' must be text: token numbers mean something else to each model. With LangChain's OpenAIEmbeddings, "
            "set check_embedding_ctx_length=False to make it send text.",
            param="input",
        )
    if "length" in text:
        return InvalidRequest(
            f"'input' must be a non-empty string, or a list of 1 to {MAX_TEXTS} of them.", param=error.param
        )
    return error


# Answers


def render_embeddings(vectors: list[EncodedVector], model: str, prompt_tokens: int) -> bytes:
    """Render the answer. `model` is the name that the client sent."""
    data = b",".join([b'{"object":"embedding","index":%d,"embedding":%b}' % pair for pair in enumerate(vectors)])
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (prompt_tokens, prompt_tokens)
    return b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (data, msgspec.json.encode(model), usage)
