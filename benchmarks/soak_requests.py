"""Requests of `soak.py`: a mixture of everything that clients send, and moments to leave. No I/O."""

import base64
import io
import itertools
import json
import random
from collections.abc import Callable
from typing import Any

from PIL import Image

from benchmarks.clients import Expected, Leave, Plan, head_of
from benchmarks.requests import noise_png
from gateway.simulate.text import digest

CHAT_MODEL, VISION_MODEL, EMBEDDING_MODEL = "soak-chat", "soak-vision", "soak-embedding"
KEY, ADMIN_KEY = "soak-key", "soak-admin-key"
CHAT_PATH, EMBEDDINGS_PATH = "/v1/chat/completions", "/v1/embeddings"
DEADLINE = 60.0
LARGE_IMAGE_BYTES = 5 * 1024 * 1024
LONG_TEXTS = (200_000, 500_000, 900_000)
_ASSEMBLED_TOKENS = 2000
"""`max_tokens` above which the gateway asks a vLLM for a stream and assembles it."""


class Mixture:
    """Source of plans; the same seed gives the same plans."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._numbers = itertools.count(1)
        self._images = [_small_image(self._dice, kind) for kind in ("PNG", "JPEG", "GIF", "PNG")]
        self._large_image = _data_url("png", noise_png(LARGE_IMAGE_BYTES * 4 // 3))
        self._long_texts = [f"{'lorem ipsum dolor ' * (size // 18)}." for size in LONG_TEXTS]
        self._kinds: list[tuple[float, Callable[[str], Plan]]] = [
            (0.38, self._stream),
            (0.18, self._plain),
            (0.04, self._assembled),
            (0.10, self._small_picture),
            (0.01, self._large_picture),
            (0.03, self._long_chat),
            (0.14, self._embeddings),
            (0.12, self._refused),
        ]

    def plan(self, *, leaves_more: bool) -> Plan:
        """Return the next request. Most clients leave if `leaves_more`, else a third."""
        self._leaves = self._dice.random() < (0.9 if leaves_more else 0.3)
        weights = [weight for weight, _ in self._kinds]
        make = self._dice.choices([make for _, make in self._kinds], weights)[0]
        return make(f"soak-{next(self._numbers):07}")

    def _leave(self, seconds: float, tokens: int = 0) -> Leave | None:
        """Return a moment to leave within an answer that takes about `seconds` and has `tokens`."""
        if not self._leaves:
            return None
        dice, resets = self._dice, self._dice.random() < 0.4
        moment = dice.choices(["uploading", "waiting", "streaming"], [0.2, 0.5, 0.3 if tokens else 0.0])[0]
        if moment == "uploading":
            return Leave("uploading", dice.uniform(0.0, 0.95), resets)
        if moment == "streaming":
            return Leave("streaming", dice.randrange(1, max(2, tokens - 2)), resets)
        return Leave("waiting", dice.uniform(0.0, dice.choice((0.1, 0.5 * seconds, seconds))), resets)

    def _chat(
        self, request_id: str, kind: str, tier: str, text: str, tokens: int, *,
        stream: bool = False, images: tuple[str, ...] = (), max_tokens: int | None = None, seconds: float = 0.0,
    ) -> Plan:  # fmt: skip
        content: Any = text
        if images:
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
            content = [{"type": "text", "text": text}, *parts]
        body: dict[str, Any] = {
            "model": tier,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens if max_tokens is None else max_tokens,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        beginning = f"{digest(text)} saw {len(images)} images"
        expected = Expected(beginnings={"ollama": beginning, "vllm": beginning}, tokens=tokens)
        leave = self._leave(0.15 + tokens / 40 + seconds, tokens if stream else 0)
        return self._made(request_id, kind, CHAT_PATH, json.dumps(body).encode(), expected, leave)

    def _made(
        self, request_id: str, kind: str, path: str, body: bytes, expected: Expected, leave: Leave | None, **fields: str
    ) -> Plan:
        is_kept = leave is None and self._dice.random() < 0.5
        key = self._dice.choice((KEY, f"{KEY}-2"))
        fields = {"authorization": f"Bearer {key}"} | fields
        head = head_of(request_id, path, len(body), kept=is_kept, **fields)
        return Plan(request_id, kind, head, body, expected, DEADLINE, leave, is_kept)

    def _question(self, request_id: str, tokens: int) -> str:
        return f"{tokens} words about {request_id}"

    def _stream(self, request_id: str) -> Plan:
        tokens = self._dice.randrange(6, 40)
        tier = self._dice.choice(("server", "server", "local"))
        return self._chat(request_id, "stream", tier, self._question(request_id, tokens), tokens, stream=True)

    def _plain(self, request_id: str) -> Plan:
        tokens = self._dice.randrange(6, 30)
        tier = self._dice.choice(("server", "local"))
        return self._chat(request_id, "plain", tier, self._question(request_id, tokens), tokens)

    def _assembled(self, request_id: str) -> Plan:
        tokens = self._dice.randrange(6, 30)
        text = self._question(request_id, tokens)
        return self._chat(request_id, "assembled", "server", text, tokens, max_tokens=_ASSEMBLED_TOKENS)

    def _small_picture(self, request_id: str) -> Plan:
        urls = tuple(self._dice.choice(self._images) for _ in range(self._dice.randrange(1, 4)))
        tier = self._dice.choice(("server", "server", "server", "pictures"))
        stream = self._dice.random() < 0.5
        return self._chat(
            request_id, "image", tier, self._question(request_id, 8), 8, stream=stream, images=urls, seconds=0.2
        )

    def _large_picture(self, request_id: str) -> Plan:
        text = self._question(request_id, 8)
        return self._chat(request_id, "large image", "server", text, 8, images=(self._large_image,), seconds=1.0)

    def _long_chat(self, request_id: str) -> Plan:
        text = f"{self._question(request_id, 8)} {self._dice.choice(self._long_texts)}"
        tier = self._dice.choice(("server", "local"))
        return self._chat(request_id, "long chat", tier, text, 8, stream=self._dice.random() < 0.5, seconds=0.3)

    def _embeddings(self, request_id: str) -> Plan:
        texts = [f"text {n} of {request_id}" for n in range(self._dice.randrange(1, 9))]
        body: dict[str, Any] = {"model": "vectors", "input": texts}
        if self._dice.random() < 0.5:
            body["encoding_format"] = "base64"
        expected = Expected(vectors=len(texts))
        return self._made(
            request_id, "embeddings", EMBEDDINGS_PATH, json.dumps(body).encode(), expected, self._leave(0.05)
        )

    def _refused(self, request_id: str) -> Plan:
        """Return a request that the gateway refuses before its queue."""
        chat: dict[str, Any] = {"model": "server", "messages": [{"role": "user", "content": "hello"}]}
        broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]
        cases: list[tuple[bytes, Expected, dict[str, str]]] = [
            (b'{"model": "server", "messages": [', Expected(400, "invalid_json"), {}),
            (json.dumps(chat | {"model": "none"}).encode(), Expected(404, "model_not_found"), {}),
            (json.dumps(chat | {"modalities": ["audio"]}).encode(), Expected(400, "unsupported_parameter"), {}),
            (json.dumps(chat | {"temperature": "hot"}).encode(), Expected(400, "invalid_value"), {}),
            (json.dumps(chat).encode(), Expected(401, "invalid_api_key"), {"authorization": "Bearer wrong"}),
            (json.dumps(chat).encode(), Expected(415, "unsupported_media_type"), {"content_type": "text/plain"}),
            (b" " * 22 * 1024 * 1024, Expected(413, "request_too_large"), {}),
            (
                json.dumps(chat | {"messages": [{"role": "user", "content": broken}]}).encode(),
                Expected(400, "invalid_image"),
                {},
            ),
        ]
        body, expected, fields = self._dice.choice(cases)
        leave = self._leave(0.02) if self._dice.random() < 0.3 else None
        return self._made(request_id, "refused", CHAT_PATH, body, expected, leave, **fields)


def _data_url(kind: str, image: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _small_image(dice: random.Random, kind: str) -> str:
    """Return a data URL of a picture of 96 x 96 pixels; GIFs and transparent PNGs are converted."""
    mode = "RGB" if kind == "JPEG" else dice.choice(("RGB", "RGBA"))
    picture = Image.frombytes(mode, (96, 96), dice.randbytes(96 * 96 * len(mode)))
    out = io.BytesIO()
    (picture.convert("P") if kind == "GIF" else picture).save(out, kind)
    return _data_url(kind.lower(), out.getvalue())
