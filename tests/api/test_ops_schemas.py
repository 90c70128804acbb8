"""The description of `/ops`: every operation, with schemas that the real answers follow."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import jsonschema
import msgspec
import pytest

from gateway.api.ops_schemas import OPERATIONS, OpsStatus
from tests.api.both_engines import serving

pytestmark = pytest.mark.uvloop


@pytest.fixture
async def described(client: httpx2.AsyncClient) -> dict[str, Any]:
    document: dict[str, Any] = (await client.get("/openapi.json")).json()
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        if path.startswith("/ops/"):
            for method, operation in methods.items():
                yield method, path, operation


async def test_every_operation_has_an_id_a_summary_security_and_errors(described: dict[str, Any]) -> None:
    found = list(operations(described))
    assert {(method, path) for method, path, _ in found} >= {*OPERATIONS, ("get", "/ops/events"), ("post", "/ops/chat")}
    names = [operation["operationId"] for _, _, operation in found]
    assert len(names) == len(set(names))
    assert set(described["components"]["securitySchemes"]) >= {"admin"}
    for _, path, operation in found:
        assert operation["summary"], path
        assert operation["security"][0] == {"admin": []}
        assert {"200", "401", "403"} <= set(operation["responses"]), path
        assert "422" not in operation["responses"], path
        assert operation["responses"]["200"]["content"], path


def undescribed(value: Any, kind: type[msgspec.Struct]) -> str:
    """Return the differences between an answer and its structure, empty if there is none."""
    strict = msgspec.json.schema(kind)
    for definition in strict["$defs"].values():
        if "properties" in definition:
            definition["additionalProperties"] = False
    errors = jsonschema.Draft202012Validator(strict).iter_errors(value)
    return "; ".join(f"{error.json_path}: {error.message}" for error in errors)


def test_a_field_without_a_description_is_found() -> None:
    assert "'new' was unexpected" in undescribed({"new": 1}, OpsStatus)


async def test_answers_have_the_fields_that_are_described_and_no_others() -> None:
    canary = {"canary": {"backend": "vllm", "percent": 50}}
    async with serving(guard={}, llm_backend="ollama") as (gateway, client):
        for text in "abcdefgh":
            await gateway.ask({"model": "gpt-4o", "stream": True, "messages": [{"role": "user", "content": text}]})
        await gateway.ask({"model": "pinned"})
        gateway.gateway.settle()
        answers = {
            ("put", "/ops/rollout"): await client.put("/ops/rollout", json=canary),
            ("get", "/ops/rollout"): await client.get("/ops/rollout"),
            ("post", "/ops/preflight"): await client.post("/ops/preflight?seconds=5"),
            ("get", "/ops/status"): await client.get("/ops/status"),
            ("post", "/ops/rollback"): await client.post("/ops/rollback"),
            ("post", "/ops/undo"): await client.post("/ops/undo"),
        }
        assert answers.keys() == OPERATIONS.keys()
        for operation, answer in answers.items():
            assert answer.status_code == 200
            assert undescribed(answer.json(), OPERATIONS[operation][1]) == "", operation
        status = answers["get", "/ops/status"].json()
        assert status["tiers"]["team/Standard"]["guard"] is not None
        assert status["errors"]
        assert json.dumps(status["series"])
