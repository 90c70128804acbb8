"""Default limits of each kind of backend."""

import pytest

from tests.config.harness import load

pytestmark = pytest.mark.usefixtures("empty_environment")


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("ollama", (4, "auto", 1, None, 256, 512, 300.0, 3600.0, 2.0, 300.0, 300.0, 3600.0)),
        ("vllm", (128, 128, 128, None, 512, 512, 60.0, 300.0, 2.0, 120.0, 120.0, 3600.0)),
    ],
)
def test_default_limits_depend_on_the_kind(backend: str, expected: tuple[object, ...]) -> None:
    assert tuple(load().limits_for("standard", backend).model_dump().values()) == expected


def test_model_and_vision_concurrency_of_vllm_default_to_max_concurrency() -> None:
    limits = load("backends: {vllm: {max_concurrency: 16}}").backends["vllm"].limits
    assert (limits.model_concurrency, limits.vision_concurrency) == (16, 16)
