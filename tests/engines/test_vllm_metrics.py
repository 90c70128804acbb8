"""Facts from vLLM's metrics: the size of the prefix cache."""

import pytest

from gateway.engines.vllm_metrics import prefix_cache_tokens

LINE = "vllm:cache_config_info{%s} 1.0\n"


@pytest.mark.parametrize(
    ("labels", "tokens"),
    [
        (
            'block_size="128",enable_prefix_caching="True",kv_cache_size_tokens="4194304",num_gpu_blocks="32768"',
            4194304,
        ),
        ('block_size="16",enable_prefix_caching="True",num_gpu_blocks="1000"', 16_000),
        ('block_size="16",enable_prefix_caching="False",num_gpu_blocks="1000"', 0),
        ('block_size="16",engine="0",num_gpu_blocks="None"', None),
        ('block_size="16"', None),
        (f'block_size="16",num_gpu_blocks="{"9" * 400}"', None),
        ('kv_cache_size_tokens="-5"', None),
    ],
)
def test_size_of_the_prefix_cache(labels: str, tokens: int | None) -> None:
    metrics = f"# TYPE vllm:cache_config_info gauge\n{LINE % labels}vllm:other 1.0\n"
    assert prefix_cache_tokens(metrics.encode()) == tokens


def test_other_metrics_tell_nothing() -> None:
    assert prefix_cache_tokens(b"vllm:num_requests_running 1.0\n") is None
