"""The OpenAPI document and its HTML page.

Covers: gateway/api/paths.py
"""

from typing import Any

from gateway.api.openapi import ERRORS, add_data_paths, api_page
from gateway.api.paths import CHAT_PATH, COMPLETION_PATHS, EMBEDDING_PATH


def example_document() -> dict[str, Any]:
    document: dict[str, Any] = {
        "info": {"title": "A <title>", "version": "1"},
        "paths": {"/x": {"get": {"summary": "<b>bold</b>", "responses": {"200": {"description": "<ok>"}}}}},
    }
    add_data_paths(document)
    return document


def test_chat_is_added_with_its_fields_and_errors() -> None:
    document = example_document()
    operation = document["paths"][CHAT_PATH]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    chat = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert chat["required"] == ["model", "messages"]
    assert set(operation["responses"]) == {"200", *map(str, ERRORS)}
    assert "Error" in document["components"]["schemas"]


def test_embeddings_are_added_with_their_fields() -> None:
    document = example_document()
    schema = document["paths"][EMBEDDING_PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    embedding = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    assert embedding["required"] == ["model", "input"]
    page = api_page(document)
    assert page.index(CHAT_PATH) < page.index(EMBEDDING_PATH) < page.index("<code>/x</code>")


def test_text_completions_are_added_with_their_fields() -> None:
    document = example_document()
    schema = document["paths"][COMPLETION_PATHS[0]]["post"]["requestBody"]["content"]["application/json"]["schema"]
    completion = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    assert completion["required"] == ["model", "prompt"]


def test_existing_paths_are_kept() -> None:
    assert "/x" in example_document()["paths"]


def test_page_shows_each_path_field_and_status_chat_first() -> None:
    page = api_page(example_document())
    assert page.index(CHAT_PATH) < page.index("<code>/x</code>")
    for shown in ("temperature", "messages", "required", "(≥ 0, ≤ 2)", "array of", *map(str, ERRORS)):
        assert shown in page


def test_page_escapes_what_it_shows() -> None:
    page = api_page(example_document())
    for raw in ("<title>A <title>", "<b>bold", "<ok>"):
        assert raw not in page
    assert "&lt;ok&gt;" in page
