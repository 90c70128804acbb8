"""The part of vLLM's `/metrics` that a gateway reads, with vLLM's names."""

from gateway.simulate.engine import SimulatedEngine

CACHE_BLOCKS = 8192
"""Blocks of 16 tokens in the KV cache, as it is reported. The stand-in keeps no cache."""


def exposition(engine: SimulatedEngine, model: str, *, is_asleep: bool = False) -> bytes:
    """Return the counters of `engine` in Prometheus' text format."""
    labels = f'engine="0",model_name="{model}"'
    cache = f'block_size="16",enable_prefix_caching="True",engine="0",num_gpu_blocks="{CACHE_BLOCKS}"'
    config_labels = f'{cache},gpu_memory_utilization="{engine.options.gpu_share}"'
    lines = []
    for name, kind, help_text, value in (
        ("num_requests_running", "gauge", "Number of requests in model execution batches.", engine.running),
        ("num_requests_waiting", "gauge", "Number of requests waiting to be processed.", engine.waiting),
        (
            "kv_cache_usage_perc",
            "gauge",
            "KV-cache usage. 1 means 100 percent usage.",
            min(1.0, engine.running / engine.options.max_num_seqs),
        ),
        ("prompt_tokens_total", "counter", "Number of prefill tokens processed.", engine.prompt_tokens),
        ("generation_tokens_total", "counter", "Number of generation tokens processed.", engine.generation_tokens),
    ):
        lines += [
            f"# HELP vllm:{name} {help_text}",
            f"# TYPE vllm:{name} {kind}",
            f"vllm:{name}{{{labels}}} {float(value)}",
        ]
    lines += [
        "# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig",
        "# TYPE vllm:cache_config_info gauge",
        f'vllm:cache_config_info{{{config_labels},kv_cache_memory_bytes="None"}} 1.0',
        "# HELP vllm:engine_sleep_state Engine sleep state",
        "# TYPE vllm:engine_sleep_state gauge",
        f'vllm:engine_sleep_state{{{labels},sleep_state="awake"}} {float(not is_asleep)}',
    ]
    name = "request_success_total"
    lines += [f"# HELP vllm:{name} Count of successfully processed requests.", f"# TYPE vllm:{name} counter"]
    for reason in ("stop", "length", "abort", "error", "repetition"):
        value = engine.cancelled if reason == "abort" else engine.finished.get(reason, 0)
        lines.append(f'vllm:{name}{{engine="0",finished_reason="{reason}",model_name="{model}"}} {float(value)}')
    return ("\n".join(lines) + "\n").encode()
