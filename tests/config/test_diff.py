"""Differences between settings: lines that describe them, and changes that need a restart."""

from pathlib import Path
from typing import Any

import pytest

from gateway import config
from gateway.config import AT_START, Settings, compare, is_same_place

DOCUMENT: dict[str, Any] = {
    "backends": {
        "ollama": {"base_url": "http://127.0.0.1:1"},
        "vllm": {"base_url": "http://127.0.0.1:2", "api_key": "s3cret-of-a-backend-01"},
    },
    "tiers": {"one": {"models": {"ollama": "a", "vllm": "A"}}, "two": {"models": {"ollama": "b"}}},
    "api_keys": ["s3cret-of-a-client-0001"],
}


def changed(**more: Any) -> Settings:
    return config.build(DOCUMENT | more)


def lines(**more: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = compare(config.build(DOCUMENT), changed(**more))
    return found.changed, found.waiting


def test_equal_settings_have_no_differences() -> None:
    assert lines() == ((), ())


@pytest.mark.parametrize(
    ("more", "described"),
    [
        ({"heartbeat": 5}, ("heartbeat: 5.0, was 15.0",)),
        (
            {"tiers": DOCUMENT["tiers"] | {"two": {"models": {"ollama": "c"}}}},
            ("tiers.two.models.ollama: 'c', was 'b'",),
        ),
        ({"tiers": DOCUMENT["tiers"] | {"three": {"models": {"ollama": "c"}}}}, ("tiers.three: new",)),
        ({"tiers": {"one": DOCUMENT["tiers"]["one"]}}, ("tiers.two: removed",)),
        (
            {"tiers": {"two": DOCUMENT["tiers"]["two"], "one": DOCUMENT["tiers"]["one"]}, "default_tier": "one"},
            ("tiers: the order changed",),
        ),
        (
            {"tiers": DOCUMENT["tiers"] | {"two": {"models": {"ollama": "b"}, "aliases": ["x"]}}},
            ("tiers.two.aliases: changed",),
        ),
        (
            {"backends": DOCUMENT["backends"] | {"ollama": {"base_url": "http://127.0.0.1:3"}}},
            ("backends.ollama.servers: changed",),
        ),
        (
            {"backends": DOCUMENT["backends"] | {"ollama": {"base_url": "http://127.0.0.1:1", "max_queue": 3}}},
            ("backends.ollama.max_queue: 3, was 256",),
        ),
        ({"auto": [{"tier": "two", "images": True}]}, ("auto: changed",)),
        ({"llm_backend": "ollama", "default_tier": "two"}, ("default_tier: 'two', was 'one'",)),
    ],
)
def test_change_is_described_with_its_key(more: dict[str, Any], described: tuple[str, ...]) -> None:
    assert lines(**more) == (described, ())


def test_changed_secret_is_not_shown() -> None:
    backends = DOCUMENT["backends"] | {"vllm": {"base_url": "http://127.0.0.1:2", "api_key": "another-s3cret-0123456"}}
    described, waiting = lines(backends=backends, api_keys=["another-s3cret-0123457"])
    assert (described, waiting) == (("backends.vllm.api_key: changed", "api_keys: changed"), ())


KEYS = ["a-key-of-a-client-0123456789", "another-key-of-a-client-012345"]


def test_client_keys_change_at_once() -> None:
    before, after = (config.build(DOCUMENT | {"api_keys": keys}) for keys in (KEYS, KEYS[1:]))
    found = compare(before, after)
    assert (found.settings.api_keys, found.changed, found.waiting) == (after.api_keys, ("api_keys: changed",), ())


@pytest.mark.parametrize(("before", "after"), [(KEYS, None), (None, KEYS)])
def test_gateway_is_opened_and_closed_only_by_a_restart(before: list[str] | None, after: list[str] | None) -> None:
    current = config.build({**DOCUMENT, "api_keys": before})
    found = compare(current, config.build({**DOCUMENT, "api_keys": after, "heartbeat": 3}))
    assert found.settings.api_keys == current.api_keys
    assert (found.changed, found.waiting) == (("heartbeat: 3.0, was 15.0",), ("api_keys: changed",))


def test_key_that_needs_a_restart_keeps_its_value() -> None:
    found = compare(config.build(DOCUMENT), changed(port=9999, host="0.0.0.0", drain_timeout=5, heartbeat=5))
    assert found.waiting == ("host: '0.0.0.0', was '127.0.0.1'", "port: 9999, was 8080", "drain_timeout: 5.0, was 30.0")
    assert (found.settings.port, found.settings.host, found.settings.heartbeat) == (8080, "127.0.0.1", 5.0)
    assert compare(found.settings, changed(port=9999, heartbeat=5)).waiting == ("port: 9999, was 8080",)


def test_every_setting_either_applies_at_once_or_needs_a_restart() -> None:
    """A new setting must be added here: a change applies at run time, or needs a restart."""
    at_once = {
        "llm_backend", "rollback_to", "backends", "tiers", "default_tier", "auto", "embeddings", "rerankers",
        "commit_after", "heartbeat", "waiting_note", "max_body", "max_text_body", "max_waiting_bytes",
        "rollback_cutoff", "log_level", "api_keys", "api_keys_file", "image_urls", "record",
        "record_size", "wake_timeout",
    }  # fmt: skip
    assert at_once | set(AT_START) | {"file", "sources", "warnings"} == set(Settings.model_fields)


def test_limits_of_tiers_are_merged_again() -> None:
    limited = {"one": {"models": {"ollama": "a"}, "limits": {"ollama": {"concurrency": 2}}}}
    found = compare(config.build(DOCUMENT), changed(tiers=limited, port=1))
    assert found.settings.limits_for("one", "ollama").concurrency == 2
    assert found.changed[0] == "tiers.one.models.vllm: nothing, was 'A'"


def test_the_file_itself_is_not_a_difference(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("heartbeat: 15\n")
    read = config.load(file, {})
    assert read.file == file
    assert compare(config.load(None, {}), read).changed == ()


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({}, True),
        ({"max_queue": 3, "probe_interval": 7}, True),
        ({"kind": "openai"}, False),
        ({"base_url": "https://127.0.0.1:3"}, False),
        ({"api_key": "another-s3cret-0123456"}, False),
        ({"headers": {"x-team": "two"}}, False),
        ({"headers": {}}, False),
        ({"ca_file": "other.pem"}, False),
        ({"ca_file": None}, False),
    ],
    ids=[
        "nothing", "limits", "kind", "address", "key", "value of a header", "no header", "other CA file", "no CA file",
    ],
)  # fmt: skip
def test_backend_is_the_same_place_only_if_it_is_reached_in_the_same_way(
    change: dict[str, Any], is_same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ca.pem", "other.pem"):
        (tmp_path / name).touch()
    backend = {
        "kind": "vllm",
        "base_url": "https://127.0.0.1:2",
        "api_key": "s3cret-of-a-backend-01",
        "headers": {"x-team": "one"},
        "ca_file": "ca.pem",
    }
    one, other = (
        changed(backends=DOCUMENT["backends"] | {"vllm": keys}).backends["vllm"] for keys in (backend, backend | change)
    )
    assert is_same_place(one, other) is is_same
