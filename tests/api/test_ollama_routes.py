"""Ollama's own API: lists and descriptions of models, refusals, keys and browsers."""

import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, cast

import httpx2
import pytest
from fastapi import FastAPI

from gateway.api.model_catalog import ModelCatalog, PublicEntry, allow_all
from gateway.api.ollama_routes import CHANGING, MAX_SHOW_BODY, SECONDS_KEPT, SECONDS_LOADED, VERSION, add_ollama
from tests.api.both_engines import KEY, bearer, serving
from tests.fakes.processor_time import processor_seconds

PUBLIC = ["team/Standard", "gpt-4o", "pinned", "bge-m3"]
ORIGIN = "http://localhost:3000"


@pytest.fixture
async def guarded() -> AsyncIterator[httpx2.AsyncClient]:
    """Return a client of a gateway that wants a key."""
    async with serving(api_keys=[KEY]) as (_, client):
        yield client


def error_of(answer: httpx2.Response) -> tuple[int, str]:
    """Return the status and the message of an error in Ollama's form."""
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert list(answer.json()) == ["error"]
    return answer.status_code, answer.json()["error"]


async def test_root_answers_as_ollama_does_without_a_key(guarded: httpx2.AsyncClient) -> None:
    answer = await guarded.get("/")
    assert (answer.status_code, answer.text) == (200, "Ollama is running")
    head = await guarded.head("/")
    assert (head.status_code, head.content) == (200, b"")


async def test_version_is_numeric_and_new_enough_for_clients(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/api/version")).json() == {"version": VERSION}
    assert tuple(map(int, VERSION.split("."))) >= (0, 6, 4)
    assert (await client.head("/api/version")).status_code == 200


async def test_answers_have_the_media_type_of_ollamas(client: httpx2.AsyncClient) -> None:
    answers = [await client.get(path) for path in ("/api/version", "/api/tags", "/api/ps")]
    answers.append(await client.post("/api/show", json={"model": "gpt-4o"}))
    assert {answer.headers["content-type"] for answer in answers} == {"application/json; charset=utf-8"}


async def test_tags_list_every_public_name_with_a_tag(client: httpx2.AsyncClient) -> None:
    models = (await client.get("/api/tags")).json()["models"]
    assert [model["name"] for model in models] == [f"{name}:latest" for name in PUBLIC]
    assert all(model["model"] == model["name"] for model in models)
    assert len({model["digest"] for model in models}) == len(models)
    by_name = {model["name"]: model for model in models}
    assert by_name["team/Standard:latest"]["details"]["context_length"] == 8192  # the smaller engine's
    assert "context_length" not in by_name["pinned:latest"]["details"]
    assert by_name["bge-m3:latest"]["capabilities"] == ["embedding"]
    assert by_name["team/Standard:latest"]["capabilities"][0] == "completion"
    assert (await client.head("/api/tags")).status_code == 200


@pytest.mark.parametrize("name", ["team/Standard", "TEAM/standard:latest", "gpt-4o", "gpt-4o:latest", "hidden", "auto"])
@pytest.mark.parametrize("field", ["model", "name"])
async def test_show_describes_every_name_that_chats_accept(client: httpx2.AsyncClient, name: str, field: str) -> None:
    answer = await client.post("/api/show", json={field: name, "verbose": True})
    shown = answer.json()
    assert answer.status_code == 200
    assert shown["model_info"]["general.architecture"] == shown["details"]["family"]
    assert shown["model_info"][f"{shown['details']['family']}.context_length"] == 8192
    assert "completion" in shown["capabilities"]


async def test_show_needs_no_media_type(client: httpx2.AsyncClient) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert (await client.post("/api/show", content=b'{"model":"bge-m3"}', headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "missing request body"),
        (b"{}", 400, "model is required"),
        (b'{"model": ""}', 400, "model is required"),
        (b'{"model": null}', 400, "model is required"),
        (b'{"model": 3}', 400, "Expected a string"),
        (b'{"model":', 400, "valid JSON"),
        (b"\xff", 400, "valid JSON"),
        (b"[]", 400, "JSON object"),
        (b"[" * 10_000, 400, ""),
        (b'{"model": "nope"}', 404, "model 'nope' not found"),
        (b'{"model": "\\ud83d"}', 404, "not found"),
        (b'{"model": "x", "a": "%b"}' % (b"a" * MAX_SHOW_BODY), 413, "bytes"),
    ],
)
async def test_show_refuses_in_ollamas_form(client: httpx2.AsyncClient, body: bytes, status: int, message: str) -> None:
    found, text = error_of(await client.post("/api/show", content=body))
    assert found == status
    assert message in text


async def test_ps_lists_what_can_be_served_without_a_load(client: httpx2.AsyncClient) -> None:
    """The tier is on a vLLM, which keeps its model; the embedding model is not loaded."""
    models = (await client.get("/api/ps")).json()["models"]
    assert [model["name"] for model in models] == ["team/Standard:latest", "gpt-4o:latest"]
    assert models[0]["context_length"] == 8192
    assert models[0]["expires_at"].endswith("Z")


@pytest.mark.parametrize("path", [path.replace("{digest:path}", "sha256:0a1b") for path in CHANGING])
@pytest.mark.parametrize("method", ["POST", "DELETE", "HEAD"])
async def test_what_changes_models_is_refused(client: httpx2.AsyncClient, path: str, method: str) -> None:
    answer = await client.request(method, f"/api/{path}", content=None if method == "HEAD" else b'{"model": "x"}')
    assert answer.status_code == 403
    if method != "HEAD":
        assert "does not change" in error_of(answer)[1]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/api/nothing", 404), ("GET", "/api/chat", 405), ("GET", "/api/show", 405), ("POST", "/api/tags", 405)],
)
async def test_wrong_paths_and_methods_have_ollamas_form(
    client: httpx2.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await client.request(method, path)
    assert error_of(answer)[0] == status
    assert ("allow" in answer.headers) == (status == 405)


GUARDED: tuple[tuple[str, str, Any], ...] = (
    ("GET", "/api/tags", None),
    ("GET", "/api/ps", None),
    ("POST", "/api/show", {"model": "gpt-4o"}),
    ("POST", "/api/chat", {"model": "gpt-4o", "messages": []}),
    ("POST", "/api/generate", {"model": "gpt-4o"}),
    ("POST", "/api/embed", {"model": "bge-m3", "input": ""}),
    ("POST", "/api/embeddings", {"model": "bge-m3", "prompt": ""}),
)


@pytest.mark.parametrize(("method", "path", "body"), GUARDED)
async def test_a_gateway_with_keys_wants_one(
    guarded: httpx2.AsyncClient, method: str, path: str, body: dict[str, Any] | None
) -> None:
    for headers in ({}, bearer("wrong")):
        answer = await guarded.request(method, path, json=body, headers=headers)
        assert error_of(answer)[0] == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert (await guarded.request(method, path, json=body, headers=bearer(KEY))).status_code == 200


@pytest.mark.parametrize(("method", "path", "body"), GUARDED)
async def test_an_open_gateway_checks_the_host(
    client: httpx2.AsyncClient, method: str, path: str, body: dict[str, Any] | None
) -> None:
    answer = await client.request(method, path, json=body, headers={"host": "evil.example"})
    assert error_of(answer)[0] == 403


@pytest.mark.parametrize(("method", "path", "body"), GUARDED)
async def test_a_browser_may_call_from_an_allowed_origin(method: str, path: str, body: dict[str, Any] | None) -> None:
    async with serving(cors_origins=["http://localhost:*"], api_keys=[KEY]) as (_, client):
        asks = {"access-control-request-method": method, "access-control-request-headers": "content-type"}
        preflight = await client.options(path, headers={"origin": ORIGIN, **asks})
        assert preflight.status_code == 204
        assert method in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["access-control-allow-headers"] == "content-type"
        for key in (KEY, "wrong"):
            answer = await client.request(method, path, json=body, headers={"origin": ORIGIN, **bearer(key)})
            assert answer.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize("name", ["team/Standard", "gpt-4o", "hidden", "bge-m3", "auto"])
async def test_a_name_may_have_the_tag_latest_at_every_endpoint(client: httpx2.AsyncClient, name: str) -> None:
    tagged = f"{name}:latest"
    found = await client.get(f"/v1/models/{tagged}")
    assert (found.status_code, found.json()["id"]) == (200, tagged)
    assert (await client.post("/api/show", json={"model": tagged})).status_code == 200
    if name == "bge-m3":
        return
    body = {"model": tagged, "messages": [{"role": "user", "content": "Hi"}], "stream": False}
    for path in ("/v1/chat/completions", "/api/chat"):
        answer = await client.post(path, json=body)
        assert (answer.status_code, json.loads(answer.content)["model"]) == (200, tagged)


class _Listed:
    """Catalog with these models alone."""

    def __init__(self, *entries: PublicEntry) -> None:
        self.public_entries = lambda _: list(entries)


def _client_of(*entries: PublicEntry) -> httpx2.AsyncClient:
    app = FastAPI()
    add_ollama(app, cast("ModelCatalog", _Listed(*entries)), lambda: allow_all)
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://gateway")


async def test_a_name_with_a_percent_sign_and_a_quote_is_listed_as_it_is() -> None:
    entry = PublicEntry('100%b"', 8, ("completion",), is_loaded=True, stays_loaded=False)
    async with _client_of(entry) as client:
        for path in ("/api/tags", "/api/ps"):
            (model,) = (await client.get(path)).json()["models"]
            assert model["name"] == '100%b":latest'


@pytest.mark.parametrize("stays", [True, False])
async def test_a_loaded_model_expires_later_if_its_engine_keeps_it(stays: bool) -> None:
    async with _client_of(PublicEntry("a", None, (), is_loaded=True, stays_loaded=stays)) as client:
        (model,) = (await client.get("/api/ps")).json()["models"]
    remaining = (datetime.fromisoformat(model["expires_at"]) - datetime.now(UTC)).total_seconds()
    assert remaining == pytest.approx(SECONDS_KEPT if stays else SECONDS_LOADED, abs=60)


@pytest.mark.parametrize("path", ["/api/tags", "/api/ps"])
async def test_a_list_of_a_thousand_models_takes_the_loop_not_much_longer_than_its_json(path: str) -> None:
    """FastAPI's own conversion of so many objects would."""
    entries = [PublicEntry(f"m{number}:7b", 8192, ("completion",), True, False) for number in range(1000)]
    async with _client_of(*entries) as client:
        models = (await client.get(path)).json()
        assert len(models["models"]) == 1000
        times = []
        for _ in range(5):
            began = time.thread_time()
            await client.get(path)
            times.append((time.thread_time() - began) / processor_seconds(lambda: json.dumps(models)))
    assert min(times) < 1
