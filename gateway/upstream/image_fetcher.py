"""Fetching of images by their address, for clients that do not put them into the request.

The addresses come from clients, so the gateway could be made to ask servers of its own network
(SSRF). An address has to begin with an allowed prefix. Its host is resolved once, all resolved
addresses have to be public, and the connection goes to the address that was checked: a name that
resolves to another one a moment later (DNS rebinding) gains nothing. The same holds for each
redirect. Nothing of the client's request is sent along.
"""

import asyncio
import base64
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from gateway.chat.image_address import ImageAddress, IpAddress, is_allowed, is_public, parse, redirected
from gateway.chat.image_structure import kind_of
from gateway.chat.image_turns import FairTurns
from gateway.chat.images import path_of, urls_of, with_urls
from gateway.chat.request import Chat
from gateway.errors import InvalidImageUrl
from gateway.upstream.answer_head import AnswerHead
from gateway.upstream.connection import READ_BYTES, Connection, ConnectionLimits
from gateway.upstream.transport_error import TransportError

MAX_FETCHED = 64
"""Maximum number of different addresses in a request."""
MAX_SECONDS = 10.0
"""Maximum time for one image, with its redirects."""
MAX_REQUEST_SECONDS = 60.0
"""Maximum time for the images of a request, with the wait for turns."""
MAX_REDIRECTS = 3
FETCHES = 8
"""Number of images that are fetched at once, of all requests."""
STEP = 3 << 16  # bytes encoded in one call

Resolve = Callable[[str, int], Awaitable[Sequence[IpAddress]]]


class _NotFetched(Exception):
    """The reason, as the second half of a sentence without anything of the address or the answer."""


async def resolve(host: str, port: int) -> list[IpAddress]:
    """Return the addresses of `host`, in the order of the system's resolver.

    Raises:
        OSError: it has none.
    """
    with suppress(ValueError):
        return [ipaddress.ip_address(host)]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(info[4][0]) for info in found]


class ImageFetcher:
    """Replaces addresses of images in requests by the images themselves.

    The arguments other than `allow` are for tests on loopback.
    """

    def __init__(
        self,
        allow: Sequence[ImageAddress] = (),
        *,
        resolve: Resolve = resolve,
        is_public: Callable[[IpAddress], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.allow = allow
        """Prefixes of the addresses that may be fetched; empty: none."""
        self._resolve = resolve
        self._is_public = is_public
        self._tls = tls
        self._turns = FairTurns(FETCHES)

    async def fetched(
        self, chat: Chat, key: str, max_bytes: int, on_size: Callable[[int], None] = lambda size: None
    ) -> Chat:
        """Return `chat` with the images themselves, the same object if none has an address.

        `max_bytes` is the maximum size of all fetched images together. Images of a request are
        fetched one after the other, in the turns of `key`. `on_size` is called with the number of
        characters of each fetched image; its exceptions are raised.

        Raises:
            InvalidImageUrl: an address is not allowed, or what it leads to cannot be fetched or is
                not an image.
        """
        if not self.allow:
            return chat
        places = {place: url for place, url in urls_of(chat).items() if url[:5].lower() != "data:"}
        if not places:
            return chat
        if len(set(places.values())) > MAX_FETCHED:
            raise InvalidImageUrl(f"A request may have at most {MAX_FETCHED} images by address.", param="messages")
        for place, text in places.items():
            self._checked(text, path_of(*place))
        images: dict[str, str] = {}
        left = max_bytes
        try:
            async with asyncio.timeout(MAX_REQUEST_SECONDS):
                for place, text in places.items():
                    if text not in images:
                        data = await self._in_turn(text, path_of(*place), key, left)
                        left -= len(data)
                        images[text] = await _data_url(data)
                        on_size(len(images[text]))
        except TimeoutError:
            raise InvalidImageUrl(
                f"The images were not fetched within {MAX_REQUEST_SECONDS:g} s.", param="messages"
            ) from None
        return with_urls(chat, {place: images[text] for place, text in places.items()})

    def _checked(self, text: str, param: str) -> ImageAddress:
        address = parse(text)
        if address is None:
            raise InvalidImageUrl(f"'{param}' is neither a 'data:' URL nor a plain https address.", param=param)
        if not is_allowed(address, self.allow):
            raise InvalidImageUrl(
                f"'{param}' is not an address from which this gateway fetches images. Send the image as a 'data:' URL.",
                param=param,
            )
        return address

    async def _in_turn(self, text: str, param: str, key: str, max_bytes: int) -> bytes:
        address = self._checked(text, param)
        await self._turns.take(key)
        try:
            async with asyncio.timeout(MAX_SECONDS):
                return await self._fetch(address, max_bytes)
        except TimeoutError:
            reason = f"it was not fetched within {MAX_SECONDS:g} s"
        except _NotFetched as failure:
            reason = str(failure)
        finally:
            self._turns.release()
        raise InvalidImageUrl(f"The image of '{param}' cannot be used: {reason}.", param=param)

    async def _fetch(self, address: ImageAddress, max_bytes: int) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._get(address)
            with response:
                location = response.fields.get(b"location")
                if response.status in (301, 302, 303, 307, 308) and location is not None:
                    target = redirected(address, location.decode("latin-1"))
                    if target is None or not is_allowed(target, self.allow):
                        raise _NotFetched("its server redirects to an address that is not allowed")
                    address = target
                    response.mark_unusable()
                    continue
                return await _image(response, max_bytes)
        raise _NotFetched(f"its server redirects more than {MAX_REDIRECTS} times")

    async def _get(self, address: ImageAddress) -> Connection:
        """Send the request to an address that was checked, and return the connection with the answer's head."""
        try:
            found = await self._resolve(address.host, address.port)
        except (OSError, UnicodeError, ValueError):
            found = []
        if not found:
            raise _NotFetched("its host is not known")
        if not all(map(self._is_public, found)):
            raise _NotFetched("its host has an address that is not public")
        if self._tls is None:
            self._tls = ssl.create_default_context()
        head = (
            f"GET {address.target} HTTP/1.1\r\nHost: {address.authority}\r\nUser-Agent: gateway\r\n"
            "Accept: image/png, image/jpeg, image/webp, image/gif\r\nAccept-Encoding: identity\r\n"
            "Connection: close\r\n\r\n"
        ).encode("ascii")
        for number, ip in enumerate(found):
            try:
                connection = await self._connected(ip, address)
                await connection.send(head, b"")
            except ssl.SSLError:
                raise _NotFetched("its server has no valid certificate") from None
            except (OSError, TransportError):
                if number == len(found) - 1:
                    raise _NotFetched("its server does not answer") from None
            else:
                return connection
        raise AssertionError("the last address returns or raises")

    async def _connected(self, ip: IpAddress, address: ImageAddress) -> Connection:
        loop = asyncio.get_running_loop()
        connection = Connection(_Owner(), loop, ConnectionLimits())
        try:
            await loop.create_connection(
                lambda: connection, str(ip), address.port, ssl=self._tls, server_hostname=address.host
            )
        except BaseException:
            connection.abort()
            connection.connection_lost(None)  # uvloop omits it if it is cancelled just as the connection is made
            raise
        return connection


class _Owner:
    """Owner of one connection, which is closed after its answer."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(READ_BYTES))
        self.answer_head: AnswerHead | None = None

    def opened(self, connection: Connection) -> None:
        pass

    def closed(self, connection: Connection) -> None:
        pass

    def release(self, connection: Connection) -> None:
        connection.abort()


async def _image(response: Connection, max_bytes: int) -> bytes:
    if response.status != 200:
        raise _NotFetched(f"its server answers with status {response.status}")
    if response.fields.get(b"content-encoding", b"identity").lower() != b"identity":
        raise _NotFetched("its server sends it compressed")
    too_large = f"the images fetched for a request may have at most {max_bytes} bytes more"
    length = response.fields.get(b"content-length", b"0")
    if length.isdigit() and int(length) > max_bytes:
        raise _NotFetched(too_large)
    try:
        data = await response.read(max_bytes)
    except TransportError as error:
        raise _NotFetched(too_large if error.fault == "too_large" else "its server broke the answer off") from None
    if kind_of(data) is None:
        raise _NotFetched("it is not a PNG, JPEG, WebP or GIF")
    return data


async def _data_url(data: bytes) -> str:
    pieces = [f"data:image/{kind_of(data)};base64,"]
    for at in range(0, len(data), STEP):
        pieces.append(base64.b64encode(data[at : at + STEP]).decode())
        await asyncio.sleep(0)
    return "".join(pieces)
