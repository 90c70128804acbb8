"""JSON Patch: applying it to the old document gives the new one."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.json_patch import json_patch

VALUES = st.recursive(
    st.none() | st.integers(0, 3) | st.text("a/~é", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab/~01", max_size=3), inner, max_size=4),
    max_leaves=12,
)


def patched(document: Any, patch: list[dict[str, Any]]) -> Any:
    """Apply `patch` as RFC 6902 says, for the three operations."""
    root = {"": document}
    for operation in patch:
        parent, name = root, ""
        for token in operation["path"].split("/")[1:]:
            key = token.replace("~1", "/").replace("~0", "~")
            container = parent[name]
            parent, name = container, (int(key) if isinstance(container, list) else key)
        if operation["op"] == "remove":
            del parent[name]
        else:
            assert (operation["op"] == "add") == (not isinstance(parent, list) and name not in parent)
            parent[name] = operation["value"]
    return root[""]


@given(VALUES, VALUES)
def test_patch_turns_the_old_document_into_the_new_one(before: Any, after: Any) -> None:
    assert patched(copy.deepcopy(before), json_patch(before, after)) == after


@given(VALUES)
def test_equal_documents_have_no_difference(document: Any) -> None:
    assert json_patch(document, document) == []


@pytest.mark.parametrize(
    ("before", "after", "path"),
    [
        ({"tiers": {"a/b~c": {"up": None}}}, {"tiers": {"a/b~c": {"up": True}}}, "/tiers/a~1b~0c/up"),
        ({"list": [{"n": 1}, {"n": 2}]}, {"list": [{"n": 1}, {"n": 3}]}, "/list/1/n"),
        ({"list": [1]}, {"list": [1, 2]}, "/list"),
    ],
)
def test_operation_names_the_smallest_part_that_differs(before: Any, after: Any, path: str) -> None:
    assert [operation["path"] for operation in json_patch(before, after)] == [path]
