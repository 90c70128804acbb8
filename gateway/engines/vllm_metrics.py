"""Facts about a vLLM that only its metrics tell (vLLM 0.32, `v1/metrics/loggers.py`). Pure."""

import re

_CACHE = re.compile(rb"^vllm:cache_config_info\{([^\n]*)\} ", re.MULTILINE)
_LABEL = re.compile(rb'([a-z_]+)="([^"\n]*)"')


def prefix_cache_tokens(metrics: bytes) -> int | None:
    """Return how many tokens the prefix cache holds: 0 if it is off, None if the metrics do not tell.

    `kv_cache_size_tokens` is newer than the number of blocks and takes precedence. A server with
    several engines has a line for each; the first one counts.
    """
    found = _CACHE.search(metrics)
    if found is None:
        return None
    labels = dict(_LABEL.findall(found[1]))
    if labels.get(b"enable_prefix_caching") == b"False":
        return 0
    tokens = _number(labels, b"kv_cache_size_tokens")
    if tokens is not None:
        return tokens
    blocks, size = _number(labels, b"num_gpu_blocks"), _number(labels, b"block_size")
    return None if blocks is None or size is None else blocks * size


def _number(labels: dict[bytes, bytes], name: bytes) -> int | None:
    text = labels.get(name, b"")
    return int(text) if text.isdigit() and len(text) <= 15 else None
