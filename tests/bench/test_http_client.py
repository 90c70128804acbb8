"""Covers: gateway/bench/http_connection.py
Covers: gateway/bench/target.py"""

import asyncio
import base64
import json

import pytest

from gateway import simulate
from gateway.bench.http_client import HttpLoadClient, InvalidTarget, base_url
from gateway.bench.target import Api, BenchImage, Target
from tests.bench.servers import client_of, plain, request, scripted
from tests.fakes.images import png_data_url

PNG = base64.b64decode(png_data_url().partition(",")[2])
OLLAMA = simulate.Options("ollama", (simulate.Model("qwen3-vl", family="qwen3vl", vision=True),))
VLLM = simulate.Options("vllm")
OLDER_OLLAMA = simulate.Options("ollama", OLLAMA.models, generation="0.24")
SIDES: list[tuple[simulate.Options, Api, str]] = [
    (VLLM, "openai", ""),
    (VLLM, "openai", "/v1/completions"),
    (OLLAMA, "openai", ""),
    (OLLAMA, "openai", "/v1/completions"),
    (OLLAMA, "ollama", ""),
    (OLDER_OLLAMA, "openai", ""),
    (OLDER_OLLAMA, "ollama", ""),
    (OLLAMA, "ollama", "/api/generate"),
]


@pytest.mark.parametrize(("options", "api", "endpoint"), SIDES)
@pytest.mark.parametrize("stream", [True, False])
async def test_each_engine_and_api_gives_one_record(
    options: simulate.Options, api: Api, endpoint: str, stream: bool
) -> None:
    async with client_of(options, api, endpoint=endpoint) as client:
        record = await client.send(request(stream=stream, keeps_text=True), 3)
    assert (record.index, record.status, record.error, record.finish) == (3, 200, "", "stop")
    assert record.completion_tokens == 8
    assert record.prompt_tokens
    assert " saw 0 images" in record.text
    if stream:
        assert len(record.itl) == 7
        assert record.ttft is not None
        assert record.ttft + sum(record.itl) <= record.latency + 1e-6
    else:
        assert record.ttft is None
    assert record.latency > 0


@pytest.mark.parametrize(("options", "api"), [(VLLM, "openai"), (OLLAMA, "openai"), (OLLAMA, "ollama")])
async def test_images_reach_each_engine(options: simulate.Options, api: Api) -> None:
    images = (BenchImage(PNG), BenchImage(PNG))
    async with client_of(options, api) as client:
        record = await client.send(request(images=images, keeps_text=True))
    assert (record.images, record.error) == (2, "")
    assert " saw 2 images" in record.text


async def test_the_text_is_kept_only_where_it_is_asked_for() -> None:
    async with client_of(VLLM) as client:
        assert (await client.send(request())).text == ""


async def test_parameters_reach_ollama_as_options_and_what_it_lacks_is_left_out() -> None:
    async with scripted(plain(b'{"done":true}')) as (url, asked):
        client = HttpLoadClient(Target(url, "m", "ollama"))
        parameters = {"temperature": 0.5, "repetition_penalty": 1.1, "ignore_eos": True, "think": False}
        await client.send(request(parameters=parameters, stream=False))
        await client.close()
    body = json.loads(asked[0].partition(b"\r\n\r\n")[2])
    assert body["options"] == {"num_predict": 16, "temperature": 0.5, "repeat_penalty": 1.1}
    assert body["think"] is False
    assert "ignore_eos" not in body


async def test_key_and_headers_are_sent() -> None:
    async with scripted(plain(b"{}")) as (url, asked):
        client = HttpLoadClient(Target(url + "/base", "m", api_key="sk-1", headers=(("x-gateway-priority", "batch"),)))
        await client.send(request(stream=False))
        await client.close()
    head = asked[0].decode()
    assert head.startswith("POST /base/v1/chat/completions HTTP/1.1\r\n")
    assert "\r\nAuthorization: Bearer sk-1\r\n" in head
    assert "\r\nx-gateway-priority: batch\r\n" in head


async def test_the_key_is_in_no_representation() -> None:
    assert "sk-1" not in repr(Target("http://x", "m", api_key="sk-1"))


async def test_the_time_in_a_gateways_queue_is_kept() -> None:
    answer = plain(b"{}", "200 OK", "x-gateway-queue-ms: 12.5", "x-gateway-backend: vllm")
    async with scripted(answer) as (url, _):
        client = HttpLoadClient(Target(url, "m"))
        record = await client.send(request(stream=False))
        await client.close()
    assert (record.queue_ms, record.backend) == (12.5, "vllm")


FULL = b'{"error":{"message":"a secret of the prompt","type":"server_error","code":"queue_full"}}'
SSE = "content-type: text/event-stream"
CHUNK = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n'


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (plain(FULL, "503 Service Unavailable"), "http_503 queue_full"),
        (plain(b'{"error":{"code":400,"message":"secret"}}', "400 Bad Request"), "http_400"),
        (plain(b'{"error":{"code":"a secret!"}}', "400 Bad Request"), "http_400"),
        (plain(b"not found", "404 Not Found"), "http_404"),
        (plain(b'{"error":"x"}', "500 Oh"), "http_500"),
        (plain(CHUNK + b'data: {"error":{"code":"upstream_error"}}\n\n', "200 OK", SSE), "stream_error upstream_error"),
        (plain(CHUNK, "200 OK", SSE), "cut"),
        (plain(b"data: {not json\n\n", "200 OK", SSE), "invalid_answer"),
        (plain(b"", "200 OK", SSE), "cut"),
        (plain(FULL, "200 OK"), "stream_error queue_full"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\nconnection: close\r\n\r\n" + CHUNK, "cut"),
        (b"SSH-2.0-OpenSSH\r\n", "disconnected"),
        (None, "disconnected"),
    ],
)
async def test_a_failure_is_a_kind_and_never_a_text(response: bytes | None, error: str) -> None:
    async with scripted(response) as (url, _):
        client = HttpLoadClient(Target(url, "m"))
        record = await client.send(request())
        await client.close()
    assert record.error == error
    assert "secret" not in repr(record)


async def test_a_plain_answer_that_is_none_is_a_failure() -> None:
    async with scripted(plain(b"<html>"), plain(b"{}"), plain(b'  \n{"choices":[{}]}')) as (url, _):
        client = HttpLoadClient(Target(url, "m"))
        errors = [(await client.send(request(stream=False))).error for _ in range(3)]
        await client.close()
    assert errors == ["invalid_answer", "invalid_answer", ""]


async def test_nobody_listening_is_a_record() -> None:
    record = await HttpLoadClient(Target("http://127.0.0.1:1", "m")).send(request())
    assert (record.error, record.status) == ("connect", 0)


async def test_a_request_over_its_time_is_a_timeout() -> None:
    options = simulate.Options("vllm", time_to_first_token=60.0)
    async with client_of(options) as client:
        record = await client.send(request(timeout=0.05))
    assert record.error == "timeout"
    assert record.latency >= 0.05


async def test_a_request_cut_off_by_its_own_cancellation_closes_the_connection() -> None:
    async with simulate.running(simulate.Options("vllm", time_to_first_token=60.0)) as server:
        client = HttpLoadClient(Target(server.base_url, "m"))
        task = asyncio.create_task(client.send(request(model=server.options.served[0].name)))
        async with asyncio.timeout(20):
            while not server.engine.running:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not server.engine.cancelled:
                await asyncio.sleep(0)


async def test_a_kept_connection_that_the_server_closed_is_replaced() -> None:
    async with scripted(plain(b'{"choices":[{}]}'), None, plain(b'{"choices":[{}]}')) as (url, asked):
        client = HttpLoadClient(Target(url, "m"))
        records = [await client.send(request(stream=False)) for _ in range(2)]
        await client.close()
    assert [record.error for record in records] == ["", ""]
    assert len(asked) == 3


async def test_a_new_connection_that_is_closed_is_not_tried_again() -> None:
    async with scripted(None, plain(b'{"choices":[{}]}')) as (url, asked):
        client = HttpLoadClient(Target(url, "m"))
        assert (await client.send(request(stream=False))).error == "disconnected"
        await client.close()
    assert len(asked) == 1


async def test_a_body_without_a_length_ends_with_the_connection() -> None:
    async with scripted(b'HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{"choices":[{}]}') as (url, _):
        client = HttpLoadClient(Target(url, "m"))
        assert (await client.send(request(stream=False))).error == ""
        await client.close()


async def test_get_fetches_a_path() -> None:
    async with client_of(VLLM) as client:
        status, body = await client.get("/v1/models")
    assert status == 200
    assert json.loads(body)["data"]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("127.0.0.1:8080/v1/", "http://127.0.0.1:8080"),
        ("https://gw.example.com/base/v1", "https://gw.example.com/base"),
        ("http://[::1]:11434/", "http://[::1]:11434"),
    ],
)
def test_an_address_is_taken_with_or_without_v1(given: str, found: str) -> None:
    assert base_url(given) == found


@pytest.mark.parametrize("given", ["", "ftp://x", "http://", "http://u:p@x", "http://x:99999", "http://x/?a=b"])
def test_another_address_is_refused(given: str) -> None:
    with pytest.raises(InvalidTarget):
        base_url(given)
