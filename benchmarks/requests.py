"""Requests of `cost.py`: complete HTTP/1.1 messages as openai-python sends them. Pure: no I/O."""

import base64
import json
import random
import struct
import zlib

from benchmarks.subjects import KEY

_HEAD = (
    "POST {path} HTTP/1.1\r\n"
    "Host: 127.0.0.1:8080\r\n"
    "Accept-Encoding: gzip, deflate\r\n"
    "Connection: keep-alive\r\n"
    "Accept: application/json\r\n"
    "Content-Type: application/json\r\n"
    "User-Agent: OpenAI/Python 2.0.0\r\n"
    "X-Stainless-Lang: python\r\n"
    "X-Stainless-Package-Version: 2.0.0\r\n"
    "X-Stainless-OS: Linux\r\n"
    "X-Stainless-Arch: x64\r\n"
    "X-Stainless-Runtime: CPython\r\n"
    "X-Stainless-Runtime-Version: 3.11.9\r\n"
    f"Authorization: Bearer {KEY}\r\n"
    "X-Stainless-Async: false\r\n"
    "x-stainless-retry-count: 0\r\n"
    "x-stainless-read-timeout: 600\r\n"
    "Content-Length: {length}\r\n"
    "\r\n"
)
_SYSTEM = "You are a helpful assistant. Answer in short sentences and in plain words."
_QUESTION = "What does a gateway in front of two inference engines do for the people who call it?"


def chat(model: str, *, max_tokens: int, stream: bool = False, image: bytes | None = None) -> bytes:
    """Return one chat request. A stream requests its usage, as LangChain does; the image is sent as
    a `data:` URL.
    """
    question: object = _QUESTION
    if image is not None:
        url = "data:image/png;base64," + base64.b64encode(image).decode()
        question = [{"type": "text", "text": _QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    body: dict[str, object] = {
        "messages": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}],
        "model": model,
        "max_tokens": max_tokens,
        "temperature": 0.7,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return post("/v1/chat/completions", body)


def post(path: str, body: dict[str, object]) -> bytes:
    """Return a request with this JSON body, with the header that openai-python sends."""
    payload = json.dumps(body, separators=(",", ":")).encode()
    return _HEAD.format(path=path, length=len(payload)).encode() + payload


def of_client_api(path: str, model: str, *, max_tokens: int, stream: bool) -> bytes:
    """Return the question of `chat` in the form of the client API at `path`.

    Raises:
        ValueError: no form is known for `path`.
    """
    messages = [{"role": "user", "content": _QUESTION}]
    common: dict[str, object] = {"model": model, "stream": stream}
    options = {"num_predict": max_tokens, "temperature": 0.7}
    match path:
        case "/v1/chat/completions":
            return chat(model, max_tokens=max_tokens, stream=stream)
        case "/v1/responses":
            own = {"input": _QUESTION, "instructions": _SYSTEM, "max_output_tokens": max_tokens, "temperature": 0.7}
        case "/v1/messages":
            own = {"messages": messages, "system": _SYSTEM, "max_tokens": max_tokens, "temperature": 0.7}
        case "/api/chat":
            own = {"messages": [{"role": "system", "content": _SYSTEM}, *messages], "options": options}
        case "/api/generate":
            own = {"prompt": _QUESTION, "system": _SYSTEM, "options": options}
        case _:
            raise ValueError(path)
    return post(path, common | own)


def noise_png(encoded_bytes: int) -> bytes:
    """Return a valid square PNG of noise, uncompressed, whose base64 form has about
    `encoded_bytes`.
    """
    side = max(1, int((encoded_bytes * 3 / 4 / 3) ** 0.5))
    source = random.Random(7)
    rows = b"".join(b"\0" + source.randbytes(side * 3) for _ in range(side))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 0)) + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
