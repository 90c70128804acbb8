"""The chat endpoint on real sockets: what it decides before a request is relayed."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from gateway import config
from gateway.chat import images
from tests.api.one_backend import CANARY, KEY, code, document, post, serving
from tests.chat.child_samples import Gate, watched
from tests.chat.image_samples import opened
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import PATIENCE, Raw, Reply, request_bytes, running, until
from tests.upstream.test_image_fetcher import cdn

pytestmark = pytest.mark.uvloop


# Request body


async def test_text_limit_does_not_count_images() -> None:
    async with serving(max_text_body="1KiB") as (gateway, _):
        assert code(await post(gateway, {"messages": [{"role": "user", "content": "x" * 2000}]})) == (
            413,
            "request_too_large",
        )
        image = {"type": "image_url", "image_url": {"url": png_data_url(40, is_noise=True)}}
        assert (await post(gateway, {"messages": [{"role": "user", "content": [image]}]})).status == 200


def with_images(url: str, count: int = 1) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}] * count}]}


GIF_URL = "data:image/gif;base64,R0lGODlhAQABAIAAAAUEBAAAACwAAAAAAQABAAACAkQBADs="


async def test_image_by_address_is_fetched_before_a_backend_is_asked() -> None:
    body = with_images("https://cdn.example/a.png")
    assert code(await refused_address(body, {})) == (400, "invalid_image_url")
    assert code(await refused_address(body, {"allow": ["https://other.example/"]})) == (400, "invalid_image_url")
    async with cdn() as server, serving(image_urls={"allow": [server.url("/", "cdn.example")]}) as (gateway, backend):
        fetcher, trusted = gateway.gateway._image_fetcher, server.fetcher()
        server.names["cdn.example"] = ["10.0.0.1"]
        fetcher._resolve, fetcher._is_public, fetcher._tls = trusted._resolve, trusted._is_public, trusted._tls
        body = with_images(server.url(host="cdn.example"))
        assert code(await post(gateway, body)) == (400, "invalid_image_url")
        server.names["cdn.example"] = ["127.0.0.1"]
        assert fetcher._tls is not None
        fetcher._tls.check_hostname = False
        reply = await post(gateway, body)
        assert reply.status == 200
        (request,) = backend.requests
        assert b"data:image/png;base64," in request
        assert b"cdn.example" not in request


async def test_an_image_is_named_by_its_path_in_the_clients_own_api() -> None:
    bad = "data:image/png;base64,aGVsbG8="
    text = {"type": "input_text", "text": "x"}
    asked: list[tuple[str, dict[str, Any], str]] = [
        (
            "/v1/responses",
            {
                "instructions": "i",
                "input": [{"role": "user", "content": [text, {"type": "input_image", "image_url": url}]}],
            },
            "input[0].content[1].image_url",
        )
        for url in (bad, "https://cdn.example/a.png")
    ]
    source = {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}
    turn = {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "source": source}]}
    asked.append(
        ("/v1/messages", {"system": "s", "max_tokens": 1, "messages": [turn]}, "messages[0].content[1].source")
    )
    async with serving() as (gateway, backend):
        for path, body, place in asked:
            reply = await post(gateway, json.dumps({"model": "standard", **body}).encode(), path=path)
            error = json.loads(reply.body)["error"]
            assert reply.status == 400
            assert error.get("param", place) == place
            assert f"'{place}'" in error["message"] or error["code"] == "invalid_image_url"
        assert not backend.requests


async def refused_address(body: dict[str, Any], image_urls: dict[str, Any]) -> Reply:
    async with serving(**({"image_urls": image_urls} if image_urls else {})) as (gateway, backend):
        reply = await post(gateway, body)
        assert not backend.requests
        return reply


async def test_images_are_scaled_down_for_a_tier_that_says_so() -> None:
    body = with_images(png_data_url(60))
    tiers = {
        "standard": {"models": {"vllm": MODEL}, "images": {"max_pixels": 1600}},
        "ultra": {"models": {"vllm": "big"}},
    }
    async with serving(tiers=tiers) as (gateway, backend):
        for model in ("standard", "ultra"):
            assert (await post(gateway, {"model": model, **body})).status == 200
    sent = [json.loads(request.partition(b"\r\n\r\n")[2])["messages"][0]["content"][0] for request in backend.requests]
    sizes = [opened(part["image_url"]["url"]).size for part in sent]
    assert sizes == [(40, 40), (60, 60)]


async def test_one_image_of_a_key_does_not_wait_for_hundreds_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 11, A3."""
    async with serving(api_keys=[KEY, "greedy"]) as (gateway, _):
        images = gateway.gateway._images
        keys, really = [], images.checked

        async def checked(chat: Any, key: str, *more: Any) -> Any:
            keys.append(key)
            return await really(chat, key, *more)

        monkeypatch.setattr(images, "checked", checked)
        greedy = [
            asyncio.create_task(post(gateway, with_images(GIF_URL, 150), {"Authorization": "Bearer greedy"}))
            for _ in range(3)
        ]
        await until(lambda: "0 waiting" not in repr(images._turns))
        assert (await post(gateway, with_images(GIF_URL), {"Authorization": f"Bearer {KEY}"})).status == 200
        assert keys[-1] == gateway.exchanges()[-1]["key_id"]
        assert [len(key) for key in set(keys)] == [8, 8]
        assert not any(task.done() for task in greedy)
        assert [(await task).status for task in greedy] == [200] * 3


async def test_images_beyond_the_budget_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_REQUEST_PIXELS", 3)
    async with serving() as (gateway, backend):
        assert (await post(gateway, with_images(GIF_URL, 3))).status == 200
        reply = await post(gateway, with_images(GIF_URL, 4))
        assert code(reply) == (400, "invalid_image")
        assert (reply.error["param"], "at most 3 pixels" in reply.error["message"]) == ("messages", True)
        assert code(await post(gateway, with_images(GIF_URL, 501))) == (400, "invalid_image")
        assert len(backend.requests) == 1


async def test_client_that_leaves_ends_the_work_on_its_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    children, gate = watched(monkeypatch), Gate(tmp_path)
    children.codes = [gate.long_job]
    async with serving() as (gateway, backend):
        async with gateway.sent(with_images(GIF_URL, 500)):
            go_on = await asyncio.to_thread(gate.reached)
        await until(lambda: children.alive == [])
        go_on.close()
        assert not backend.requests
        assert (await post(gateway, with_images(GIF_URL))).status == 200


async def test_gateway_that_stops_leaves_no_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    children = watched(monkeypatch)
    async with serving() as (gateway, _):
        assert (await post(gateway, with_images(GIF_URL))).status == 200
        assert len(children.alive) == 1
    assert children.alive == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", (400, "invalid_json")),
        ({"messages": []}, (400, "invalid_value")),
        ({"model": None}, (400, "invalid_value")),
        ({"n": 9}, (400, "invalid_value")),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
            (400, "invalid_image_url"),
        ),
        ({"model": CANARY}, (404, "model_not_found")),
    ],
    ids=["broken JSON", "no messages", "no model", "n above 1", "image by address", "unknown model"],
)
async def test_invalid_request_is_counted_and_its_text_is_not_logged(body: Any, expected: tuple[int, str]) -> None:
    async with serving() as (gateway, backend):
        assert code(await post(gateway, body)) == expected
        assert not backend.requests
        assert gateway.metric("gateway_requests_total", tier="none", backend="none", outcome="client_error") == 1
        assert gateway.exchanges()[-1]["code"] == expected[1]
        assert CANARY not in gateway.log.getvalue().decode()


async def test_unknown_parameters_are_ignored_and_not_forwarded() -> None:
    async with serving() as (gateway, backend):
        reply = await post(
            gateway,
            {"user": "u", "logit_bias": {"1": 2}, "prompt_logprobs": 1, "x": {"y": []}, "metadata": {}, "store": True},
        )
        assert reply.status == 200
        sent = json.loads(backend.requests[0].partition(b"\r\n\r\n")[2])
        assert set(sent) == {"model", "messages", "stream", "stream_options"}


@pytest.mark.parametrize("padding", [0, 600_000], ids=["short", "long"])
async def test_half_surrogate_pairs_reach_the_backend_as_replacement_characters(padding: int) -> None:
    """`JSON.stringify` writes them, and a backend would refuse or lose the whole request."""
    content = r'"\ud83d \ud83d\ude00 \\ud83d' + " " * padding + '"'
    body = rf'{{"model":"standard","\udead":1,"messages":[{{"role":"user","content":{content}}}]}}'
    async with serving() as (gateway, backend):
        assert (await post(gateway, body.encode())).status == 200
        sent = json.loads(backend.requests[0].partition(b"\r\n\r\n")[2])
        assert sent["messages"][0]["content"].rstrip() == "\ufffd \U0001f600 \\ud83d"


# Model names


@pytest.mark.parametrize(
    ("name", "tier", "model"),
    [
        ("standard", "standard", MODEL),
        ("STANDARD", "standard", MODEL),
        ("gpt-4o-mini", "standard", MODEL),
        ("hidden", "standard", MODEL),
        ("gpt-4o", "ultra", "big"),
        ("auto", "ultra", "big"),
        ("big", "ultra", "big"),
        (MODEL, "standard", MODEL),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_model_name_selects_its_tier_and_is_returned_in_the_body(
    name: str, tier: str, model: str, stream: bool
) -> None:
    async with serving() as (gateway, backend):
        reply = await post(gateway, {"model": name, "stream": stream})
        assert {key: reply.headers[f"x-gateway-{key}"] for key in ("tier", "backend", "model", "attempts")} == {
            "tier": tier,
            "backend": "vllm",
            "model": model,
            "attempts": "1",
        }
        assert int(reply.headers["x-gateway-queue-ms"]) < 1000
        documents = reply.events[:-1] if stream else [json.loads(reply.body)]
        assert {document["model"] for document in documents} == {name}
        assert json.loads(backend.requests[0].partition(b"\r\n\r\n")[2])["model"] == model


async def test_auto_reports_its_tier_and_reason_in_the_headers() -> None:
    rules: list[dict[str, Any]] = [{"tier": "standard", "task": "simple"}, {"tier": "standard", "longer_than": 100}]
    for stream in (False, True):
        async with serving(auto=rules) as (gateway, backend):
            for body, headers, tier, reason in (
                ({}, {}, "ultra", "no rule holds"),
                ({}, {"X-Gateway-Task": "Simple"}, "standard", "rule 1: task=simple"),
                ({"messages": [{"role": "user", "content": CANARY * 10}]}, {}, "standard", "rule 2: longer_than=100"),
            ):
                reply = await post(gateway, {"model": "auto", "stream": stream, **body}, headers)
                assert (reply.status, reply.headers["x-gateway-tier"], reply.headers["x-gateway-reason"]) == (
                    200,
                    tier,
                    reason,
                )
            assert (
                "x-gateway-reason"
                not in (await post(gateway, {"stream": stream}, {"X-Gateway-Task": "nonsense"})).headers
            )
            backend.mode = "runner_dies"
            assert (await post(gateway, {"model": "auto"})).headers["x-gateway-reason"] == "no rule holds"


async def test_reason_is_not_carried_over_to_the_next_request_on_a_connection() -> None:
    async with serving(auto=[{"tier": "standard", "longer_than": 100}]) as (gateway, _), asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        reasons = []
        for model, text in (("auto", "x" * 200), ("auto", "x" * 200), ("auto", "x"), ("gpt-4o", "x")):
            writer.write(request_bytes({"model": model, "messages": [{"role": "user", "content": text}]}))
            reasons.append((await Raw(reader, writer).reply()).headers.get("x-gateway-reason"))
        writer.close()
    assert reasons == ["rule 1: longer_than=100", "rule 1: longer_than=100", "no rule holds", None]


async def test_unknown_task_is_refused_and_not_echoed() -> None:
    async with serving() as (gateway, backend):
        reply = await post(gateway, {"model": "auto"}, {"X-Gateway-Task": CANARY})
        assert code(reply) == (400, "invalid_value")
        assert reply.error is not None
        assert reply.error["param"] == "x-gateway-task"
        assert CANARY not in reply.body.decode()
        assert not backend.requests


async def test_error_for_an_unknown_model_lists_the_public_names() -> None:
    async with serving() as (gateway, _):
        reply = await post(gateway, {"model": "nope"})
        assert code(reply) == (404, "model_not_found")
        assert reply.error is not None
        assert reply.error["param"] == "model"
        assert "'standard', 'gpt-4o-mini', 'ultra', 'gpt-4o'" in reply.error["message"]
        assert "nope" not in reply.error["message"]


async def test_path_works_without_v1() -> None:
    async with serving() as (gateway, _):
        assert (await post(gateway, {}, path="/chat/completions")).status == 200


# Parameters of a tier


async def test_parameters_of_the_tier_are_sent_to_the_backend() -> None:
    params = {"default": {"temperature": 0.7, "top_p": 0.5}, "force": {"seed": 1}, "drop": ["stop"]}
    async with FaultBackend("vllm") as backend:
        settings = document(backend)
        settings["tiers"]["standard"] |= {"params": params, "max_tokens": 50}
        async with running(config.build(settings)) as gateway:
            assert (
                await post(gateway, {"temperature": 0, "seed": 9, "stop": ["x"], "max_completion_tokens": 500})
            ).status == 200
            assert (await post(gateway, {"model": "ultra", "seed": 9, "stop": ["x"]})).status == 200
        first, second = (json.loads(request.partition(b"\r\n\r\n")[2]) for request in backend.requests)
    assert {key: first.get(key) for key in ("temperature", "top_p", "seed", "stop", "max_tokens")} == {
        "temperature": 0,
        "top_p": 0.5,
        "seed": 1,
        "stop": None,
        "max_tokens": 50,
    }
    assert (second["seed"], second["stop"], second.get("temperature")) == (9, ["x"], None)


# Response


async def test_every_response_has_its_own_id() -> None:
    async with serving() as (gateway, _):
        ids = {json.loads((await post(gateway, {})).body)["id"] for _ in range(5)}
        assert len(ids) == 5
        assert all(one.startswith("chatcmpl-") for one in ids)
