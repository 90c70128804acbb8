"""Loading of settings in tests: from a text and variables, with the problems or the warnings."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from gateway import config
from gateway.config import ConfigError, Settings

EXAMPLE = """
llm_backend: ollama
rollback_to: ollama
backends:
  ollama: {kind: ollama, base_url: http://127.0.0.1:11434}
  vllm:
    kind: vllm
    servers:
      - {base_url: http://10.0.0.5:8001/v1}
      - {base_url: http://10.0.0.5:8002/v1}
      - {base_url: http://10.0.0.6:8003/v1, models: ["Qwen/Qwen3-VL-8B-Instruct"]}
tiers:
  standard: {models: {ollama: "qwen3-vl:2b", vllm: "Qwen/Qwen3-VL-2B-Instruct"}, aliases: [gpt-4o-mini, simple]}
  pro:
    models: {ollama: "qwen3-vl:4b", vllm: "Qwen/Qwen3-VL-4B-Instruct"}
    aliases: [medium]
    limits: {vllm: {concurrency: 20}}
  ultra:
    models: {ollama: "qwen3-vl:8b", vllm: "Qwen/Qwen3-VL-8B-Instruct"}
    aliases: [gpt-4o, complex, {name: background, priority: batch, listed: false}]
    fallback: true
    warm: true
    images: {max_pixels: 1003520}
    params: {default: {temperature: 0.7}, force: {reasoning_effort: none}, drop: [logit_bias]}
default_tier: standard
embeddings:
  bge-m3: {backend: ollama, model: "bge-m3"}
rerankers:
  bge-reranker: {backend: vllm, model: BAAI/bge-reranker-v2-m3}
"""
"""A settings file that uses every section."""
TIER = "tiers: {pro: {models: {ollama: a, vllm: b}%s}}"
"""A settings file with one tier, and a place for further keys of it."""
SECRET = "s3cret-of-a-client-0123456789"


def load(text: str | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Load the settings from `text` as the file, and from `environ`."""
    file = None
    if text is not None:
        file = Path("gateway.yaml")
        file.write_text(text, encoding="utf-8")
    return config.load(file, environ or {})


def problems(text: str | None = None, environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the lines with which the settings are refused."""
    with pytest.raises(ConfigError) as caught:
        load(text, environ)
    assert all("\n" not in line for line in caught.value.lines)
    return list(caught.value.lines)


def one_problem(text: str | None = None, environ: Mapping[str, str] | None = None) -> str:
    """Return the only line with which the settings are refused."""
    found = problems(text, environ)
    assert len(found) == 1, found
    return found[0]


def assert_refused(text: str, key: str, words: str) -> None:
    """Assert that the settings are refused in one line, which names `key` and contains `words`."""
    line = one_problem(text)
    assert line.lower().startswith(f"{key}: ".lower())
    assert words in line


def warned(settings: Settings) -> list[str]:
    """Return the warnings, without that of an open gateway."""
    return [line for line in settings.warnings if "the gateway is open" not in line]
