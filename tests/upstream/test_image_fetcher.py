"""Fetching of images by their address, over TLS on loopback."""

import asyncio
import base64
import ipaddress
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.chat.image_address import IpAddress, is_public, parse_prefix
from gateway.chat.message import ImagePart, ImageUrl, Message, TextPart
from gateway.chat.request import Chat
from gateway.errors import InvalidImageUrl
from gateway.upstream import image_fetcher
from gateway.upstream.image_fetcher import MAX_FETCHED, MAX_REDIRECTS, ImageFetcher
from tests.chat.image_samples import JPEG, PNG
from tests.fakes.running_gateway import PATIENCE, until

PEM = Path(__file__).parents[1] / "fakes" / "self_signed.pem"
LOOPBACK = ipaddress.ip_address("127.0.0.1")
MAX = 1 << 20
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(PNG), PNG)


class Cdn:
    """TLS server that sends `answer` to each request, and what asks it."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        """Answers in order; the last one is repeated. An empty one is silence."""
        self.requests: list[bytes] = []
        self.port = 0
        self.names: dict[str, list[str]] = {"localhost": ["127.0.0.1"]}
        self.resolved: list[str] = []

    def url(self, path: str = "/a.png", host: str = "localhost") -> str:
        return f"https://{host}:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            writer.write(answer)
            if not answer:
                await reader.read()
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def resolve(self, host: str, port: int) -> Sequence[IpAddress]:
        self.resolved.append(host)
        return [ipaddress.ip_address(text) for text in self.names[host]]

    def fetcher(self, *allow: str) -> ImageFetcher:
        """Return a fetcher for which loopback is public, and which trusts the server's certificate."""
        prefixes = [prefix for text in allow or (self.url("/"),) if (prefix := parse_prefix(text))]
        return ImageFetcher(
            prefixes,
            resolve=self.resolve,
            is_public=lambda address: address == LOOPBACK or is_public(address),
            tls=ssl.create_default_context(cafile=PEM),
        )


@asynccontextmanager
async def cdn(*answers: bytes) -> AsyncIterator[Cdn]:
    cdn = Cdn()
    cdn.answers = list(answers) or [OK]
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(PEM)
    server = await asyncio.start_server(cdn.serve, "127.0.0.1", 0, ssl=tls)
    cdn.port = server.sockets[0].getsockname()[1]
    async with server, asyncio.timeout(PATIENCE):
        yield cdn


def chat_with(*urls: str) -> Chat:
    return Chat(model="m", messages=[Message("user", [TextPart("?"), *(ImagePart(ImageUrl(url)) for url in urls)])])


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def response(status: str, *lines: str, body: bytes = b"") -> bytes:
    head = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status}", *lines, f"Content-Length: {len(body)}"))
    return head.encode() + b"\r\n" + body


async def refusal(cdn: Cdn, url: str, fetcher: ImageFetcher | None = None, max_bytes: int = MAX) -> str:
    with pytest.raises(InvalidImageUrl) as caught:
        await (fetcher or cdn.fetcher()).fetched(chat_with(url), "key", max_bytes)
    error = caught.value
    assert error.param in ("messages[0].content[1].image_url.url", "messages")
    assert "localhost" not in error.message
    assert "127.0.0.1" not in error.message
    return error.message


async def test_image_by_address_becomes_the_image_itself() -> None:
    async with cdn() as server:
        chat = await server.fetcher().fetched(chat_with(server.url("/a.png?x=1"), data_url(JPEG, "jpeg")), "key", MAX)
        assert chat.messages[0].images == [data_url(PNG), data_url(JPEG, "jpeg")]
        assert chat.messages[0].text == "?"
    (request,) = server.requests
    assert request.startswith(b"GET /a.png?x=1 HTTP/1.1\r\nHost: localhost:%d\r\n" % server.port)
    assert {line.partition(b":")[0].lower() for line in request.split(b"\r\n")[1:] if line} == {
        b"host", b"user-agent", b"accept", b"accept-encoding", b"connection",
    }  # fmt: skip


async def test_kind_of_the_image_is_told_by_its_bytes() -> None:
    async with cdn(response("200 OK", "Content-Type: text/html", body=JPEG)) as server:
        chat = await server.fetcher().fetched(chat_with(server.url()), "key", MAX)
        assert chat.messages[0].images == [data_url(JPEG, "jpeg")]
    async with cdn(response("200 OK", "Content-Type: image/png", body=b"<html>")) as server:
        assert "not a PNG, JPEG, WebP or GIF" in await refusal(server, server.url())


async def test_address_that_is_repeated_is_fetched_once() -> None:
    async with cdn() as server:
        chat = await server.fetcher().fetched(chat_with(*[server.url()] * 3), "key", MAX)
        assert chat.messages[0].images == [data_url(PNG)] * 3
        assert len(server.requests) == 1


async def test_chat_without_addresses_or_setting_stays_the_same() -> None:
    async with cdn() as server:
        inline = chat_with(data_url(PNG))
        assert await server.fetcher().fetched(inline, "key", MAX) is inline
        by_address = chat_with(server.url())
        assert await ImageFetcher().fetched(by_address, "key", MAX) is by_address
    assert not server.requests


async def test_address_that_is_not_allowed_is_never_resolved() -> None:
    async with cdn() as server:
        server.names |= {"evil.example": ["127.0.0.1"]}
        for url in (server.url(host="evil.example"), "http://localhost/a.png", "file:///etc/passwd", "x"):
            await refusal(server, url)
        with pytest.raises(InvalidImageUrl):  # nothing is fetched of a request with one of them
            await server.fetcher().fetched(chat_with(server.url(), "https://evil.example/"), "key", MAX)
    assert (server.requests, server.resolved) == ([], [])


@pytest.mark.parametrize(
    "addresses", [["10.0.0.5"], ["127.0.0.1", "10.0.0.5"], ["::ffff:169.254.169.254"], ["127.0.0.2"]]
)
async def test_host_with_an_address_that_is_not_public_is_not_asked(addresses: list[str]) -> None:
    async with cdn() as server:
        server.names["localhost"] = addresses
        assert "not public" in await refusal(server, server.url())
    assert not server.requests


async def test_connection_goes_to_the_address_that_was_checked() -> None:
    """A name that resolves to another address a moment later gains nothing: it is resolved once."""
    async with cdn() as server:
        await server.fetcher().fetched(chat_with(server.url()), "key", MAX)
        assert server.resolved == ["localhost"]


async def test_every_redirect_is_checked_like_the_address() -> None:
    async with cdn(response("302 Found", "Location: /b.png"), OK) as server:
        assert (await server.fetcher().fetched(chat_with(server.url()), "key", MAX)).messages[0].images
        assert [request.split()[1] for request in server.requests] == [b"/a.png", b"/b.png"]
        assert server.resolved == ["localhost"] * 2


@pytest.mark.parametrize(
    "location", ["http://localhost/", "https://evil.example/a.png", "https://169.254.169.254/", "/other/", "//["]
)
async def test_redirect_away_from_the_prefixes_is_refused(location: str) -> None:
    async with cdn(response("302 Found", f"Location: {location}"), OK) as server:
        fetcher = server.fetcher(server.url("/images/"))
        message = await refusal(server, server.url("/images/a.png"), fetcher)
        assert "redirects" in message
        assert len(server.requests) == 1


async def test_redirect_to_a_host_that_is_not_public_is_refused() -> None:
    async with cdn() as server:
        server.answers = [response("307 Temporary Redirect", f"Location: {server.url(host='inside.example')}"), OK]
        server.names["inside.example"] = ["10.0.0.5"]
        fetcher = server.fetcher(server.url("/"), server.url("/", "inside.example"))
        assert "not public" in await refusal(server, server.url(), fetcher)
        assert len(server.requests) == 1


async def test_redirects_have_an_end() -> None:
    async with cdn(response("301 Moved", "Location: /a.png")) as server:
        assert "redirects more than" in await refusal(server, server.url())
        assert len(server.requests) == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (response("404 Not Found", body=PNG), "status 404"),
        (response("500 Oops"), "status 500"),
        (response("302 Found"), "status 302"),
        (response("200 OK"), "not a PNG"),
        (response("200 OK", "Content-Encoding: gzip", body=PNG), "compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + PNG[:20], "broke the answer off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + PNG, "bytes more"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40000\r\n" + b"x" * 0x40000, "bytes more"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 200_000, "bytes more"),
        (b"nonsense\r\n\r\n", "does not answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000, "does not answer"),
    ],
)
async def test_answer_that_is_no_image_of_the_right_size_is_refused(answer: bytes, words: str) -> None:
    async with cdn(answer) as server:
        assert words in await refusal(server, server.url(), max_bytes=100_000)


async def test_images_of_a_request_share_the_limit() -> None:
    async with cdn() as server:
        urls = [server.url(f"/{number}.png") for number in range(3)]
        with pytest.raises(InvalidImageUrl):
            await server.fetcher().fetched(chat_with(*urls), "key", 2 * len(PNG) + 1)
        assert len(server.requests) == 3
        assert (await server.fetcher().fetched(chat_with(*urls), "key", 3 * len(PNG))).messages[0].images


async def test_server_with_another_certificate_is_refused() -> None:
    async with cdn() as server:
        server.names["cdn.example"] = ["127.0.0.1"]
        fetcher = server.fetcher(server.url("/", "cdn.example"))
        assert "certificate" in await refusal(server, server.url(host="cdn.example"), fetcher)
        strict = ImageFetcher(fetcher.allow, resolve=server.resolve, is_public=lambda _: True)
        assert "certificate" in await refusal(server, server.url(host="cdn.example"), strict)
    assert not server.requests


async def test_server_that_does_not_answer_costs_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_fetcher, "MAX_SECONDS", 0.2)
    async with cdn(b"") as server:
        assert "within 0.2 s" in await refusal(server, server.url())
    assert "does not answer" in await refusal(server, server.url())  # the server is gone


async def test_next_address_of_a_host_is_tried() -> None:
    async with cdn() as server:
        fetcher = ImageFetcher(
            server.fetcher().allow, resolve=server.resolve, is_public=lambda _: True, tls=server.fetcher()._tls
        )
        server.names["localhost"] = ["127.0.0.9", "127.0.0.1"]
        assert (await fetcher.fetched(chat_with(server.url()), "key", MAX)).messages[0].images


async def test_number_of_addresses_is_limited() -> None:
    async with cdn() as server:
        urls = [server.url(f"/{number}.png") for number in range(MAX_FETCHED + 1)]
        with pytest.raises(InvalidImageUrl, match="at most"):
            await server.fetcher().fetched(chat_with(*urls), "key", MAX)
    assert not server.requests


async def test_cancelled_fetch_leaves_nothing_behind() -> None:
    async with cdn(b"") as server:
        fetcher = server.fetcher()
        tasks = [asyncio.create_task(fetcher.fetched(chat_with(server.url()), "key", MAX)) for _ in range(20)]
        await until(lambda: len(server.requests) >= image_fetcher.FETCHES)
        assert len(server.requests) == image_fetcher.FETCHES
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server.answers = [OK]
        assert (await fetcher.fetched(chat_with(server.url()), "key", MAX)).messages[0].images


async def test_real_resolver_knows_literal_addresses_and_names() -> None:
    assert await image_fetcher.resolve("127.0.0.1", 443) == [LOOPBACK]
    assert LOOPBACK in await image_fetcher.resolve("localhost", 443)
