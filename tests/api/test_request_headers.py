"""Request headers: the request id, and the list of gateways that a request came through."""

import httpx2
import pytest

from gateway.api.paths import CHAT_PATH, EMBEDDING_PATH
from gateway.api.request_headers import MAX_VIA, reject_loop, request_id_of
from gateway.errors import InvalidRequest, LoopDetected
from tests.api.one_backend import code, post, serving

pytestmark = pytest.mark.uvloop


@pytest.mark.parametrize("given", ["abc", "A-1.b:c_2", "x" * 128])
async def test_client_request_id_is_kept(given: str) -> None:
    async with serving() as (gateway, _):
        assert (await post(gateway, {}, {"x-request-id": given})).headers["x-request-id"] == given
        assert gateway.exchanges()[-1]["request_id"] == given


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"a b", b"<script>", b"\xff", b"a\tb"])
def test_unsuitable_request_id_is_replaced(given: bytes) -> None:
    minted = request_id_of({b"x-request-id": given})
    assert minted.startswith("req-")
    assert minted != request_id_of({})


async def test_client_request_id_is_returned_on_other_routes_if_it_is_suitable(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/healthz", headers={"x-request-id": "abc-1.2:3_4"})).headers[
        "x-request-id"
    ] == "abc-1.2:3_4"
    for odd in ("a b", "x" * 129, "<script>", ""):
        assert (await client.get("/healthz", headers={"x-request-id": odd})).headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("via", [b"", b"another", b"one, two,three", b", ".join([b"0123456789abcdef"] * MAX_VIA)])
def test_list_of_gateways_is_passed_on(via: bytes) -> None:
    reject_loop({b"x-gateway-via": via}, b"this-gateway")
    reject_loop({}, b"this-gateway")


@pytest.mark.parametrize(
    "via",
    [
        b", ".join([b"0123456789abcdef"] * (MAX_VIA + 1)),
        b"x" * 33,
        b"x" * 60_000,
        b", " * 30_000,
        b"one two",
        b"one,  two",
        b",",
        b"one,",
        b"<script>",
        b"\xff",
        b"a\tb",
    ],
    ids=lambda via: repr(via[:20]),
)
def test_anything_else_in_the_list_of_gateways_is_refused(via: bytes) -> None:
    with pytest.raises(InvalidRequest, match="x-gateway-via") as raised:
        reject_loop({b"x-gateway-via": via}, b"this-gateway")
    assert (raised.value.param, len(raised.value.envelope()) < 300) == ("x-gateway-via", True)


def test_loop_is_reported_as_such_however_long_the_list_is() -> None:
    with pytest.raises(LoopDetected):
        reject_loop({b"x-gateway-via": b"one two, " * 100 + b"this-gateway"}, b"this-gateway")


async def test_no_byte_of_a_long_list_of_gateways_reaches_the_engine(client: httpx2.AsyncClient) -> None:
    headers = {"x-gateway-via": "x" * 60_000}
    async with serving() as (gateway, backend):
        for path in (CHAT_PATH, EMBEDDING_PATH):
            assert code(await post(gateway, {}, headers, path=path)) == (400, "invalid_value")
        assert backend.requests == []
        assert (await post(gateway, {})).status == 200
    assert (await client.get("/v1/models", headers=headers)).status_code == 400
