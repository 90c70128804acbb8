"""Sizes of a request for the recording of the traffic. Pure."""

from gateway.chat.request import Chat
from gateway.relay.requests import ChatRequest, EmbeddingRequest, RelayRequest, RerankRequest
from gateway.telemetry.recording import IMAGE_BEGINNING, RequestShape, TrafficRecording

_SYSTEM = ("system", "developer")


def shape_of(request: RelayRequest, recording: TrafficRecording) -> RequestShape:
    """Return the sizes of `request`; of its texts only hashes that `recording` alone can make."""
    if isinstance(request, ChatRequest):
        return _chat_shape(request, recording)
    texts: list[str] = []
    if isinstance(request, EmbeddingRequest):
        texts = request.embedding.texts
    elif isinstance(request, RerankRequest):
        texts = [request.rerank.query, *request.rerank.documents]
    return RequestShape(messages=len(texts), characters=sum(map(len, texts)))


def _chat_shape(request: ChatRequest, recording: TrafficRecording) -> RequestShape:
    chat = request.chat
    texts = [message.text for message in chat.messages]
    images = [url for message in chat.messages for url in message.images]
    prefix = texts[0] if texts and chat.messages[0].role in _SYSTEM else ""
    return RequestShape(
        messages=len(texts),
        characters=sum(map(len, texts)),
        max_tokens=chat.token_limit,
        tools=len(chat.tools or ()),
        images=tuple(_beginning(url) for url in images),
        conversation=_conversation(request, chat, texts, recording),
        prefix=recording.hashed(_encoded(prefix)) if prefix else "",
        prefix_characters=len(prefix),
    )


def _conversation(request: ChatRequest, chat: Chat, texts: list[str], recording: TrafficRecording) -> str:
    """Return the same hash for every turn of a conversation.

    As for a canary, the client's own name for the conversation identifies it, or else its beginning:
    the system message and the first user message, which every turn sends again.
    """
    key = request.key_id.encode()
    if request.session:
        return recording.hashed(b"session", key, request.session)
    first = next((index for index, message in enumerate(chat.messages) if message.role == "user"), None)
    if first is None:
        return ""
    system = texts[0] if chat.messages[0].role in _SYSTEM else ""
    images = [url[:512] + url[-512:] for url in chat.messages[first].images]
    return recording.hashed(b"beginning", key, *map(_encoded, (system, texts[first], *images)))


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _beginning(url: str) -> tuple[str, int]:
    """Return the beginning and the length of the base64 of a `data:` URL."""
    start = url.find(",") + 1
    return url[start : start + IMAGE_BEGINNING], len(url) - start
