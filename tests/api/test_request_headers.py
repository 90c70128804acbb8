"""Request headers: the request id."""

import httpx2
import pytest

from gateway.api.request_headers import request_id_of
from tests.api.one_backend import post, serving

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
