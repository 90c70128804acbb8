"""A chat completion on a raw socket, which can be closed at a chosen moment, unlike a client
library.
"""

import json
import socket
from typing import Any, Self
from urllib.parse import urlsplit


class Call:
    """A `POST /v1/chat/completions` to `url`, sent on construction.

    As a context manager it closes the connection at the end.
    """

    def __init__(self, url: str, body: dict[str, Any], key: str | None = None) -> None:
        address = urlsplit(url)
        assert address.hostname
        assert address.port
        data = json.dumps(body).encode()
        head = ["POST /v1/chat/completions HTTP/1.1", f"Host: {address.netloc}"]
        head += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        if key is not None:
            head.append(f"Authorization: Bearer {key}")
        self._received = b""
        self._socket = socket.create_connection((address.hostname, address.port), timeout=60.0)
        self._socket.sendall("\r\n".join([*head, "", ""]).encode() + data)

    def read_until(self, wanted: bytes, times: int = 1) -> bytes:
        """Read until `wanted` has arrived `times` times, and return everything received so far.

        Raises:
            AssertionError: the response ended before.
            TimeoutError: nothing arrived for 60 seconds.
        """
        while self._received.count(wanted) < times:
            data = self._socket.recv(65_536)
            assert data, f"the response ended before {times} times {wanted!r}: {self._received[-500:]!r}"
            self._received += data
        return self._received

    def leave(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
