"""Simulated time: its scale, and how images slow each other down."""

import asyncio
from typing import Any

import pytest

from gateway.simulate import SEED_SLOWDOWN, Options, Running, running
from tests.golden import picture
from tests.simulate.endpoints import client, user

SCALE = 0.002  # 51 s take a tenth of a second


def options(scale: float = SCALE, **more: Any) -> Options:
    return Options("ollama", image_seconds=51, time_scale=scale, **more)


async def send_image(server: Running, model: str = "qwen3-vl") -> float:
    """Send one image and return the simulated seconds that the response reports."""
    messages = [{"role": "user", "content": "What is it?", "images": [picture()]}]
    async with client(server) as http:
        response = await http.post("/api/chat", json={"model": model, "messages": messages, "stream": False})
    return float(response.json()["total_duration"]) / 1e9


async def timed(*work: Any) -> float:
    """Return the seconds until all of `work` is done."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await asyncio.gather(*work)
    return loop.time() - began


async def test_time_scale_shortens_the_wait_but_not_the_reported_duration() -> None:
    async with running(options()) as server:
        assert 51 <= await send_image(server) < 80


@pytest.mark.parametrize(
    ("slowdown", "least"), [(0.0, 255.0), (SEED_SLOWDOWN, 397.2)], ids=["without slowdown", "with slowdown"]
)
async def test_five_images_at_once_take_as_long_as_measured(slowdown: float, least: float) -> None:
    scale = SCALE * 4  # what the five requests themselves cost is little beside the time that passes
    async with running(options(scale, image_slowdown=slowdown)) as server:
        assert least <= await timed(*(send_image(server) for _ in range(5))) / scale < least * 1.25


async def test_ten_images_at_once_each_take_more_than_ten_minutes() -> None:
    async with running(options(image_slowdown=SEED_SLOWDOWN)) as server:
        assert min(await asyncio.gather(*(send_image(server) for _ in range(10)))) > 600


async def test_sequential_images_are_not_slowed_down() -> None:
    async with running(options(image_slowdown=SEED_SLOWDOWN)) as server:
        assert all([51 <= await send_image(server) < 80 for _ in range(3)])


async def test_images_do_not_slow_down_text_requests() -> None:
    async with running(options(image_slowdown=SEED_SLOWDOWN)) as server, client(server) as http:
        images = [asyncio.create_task(send_image(server)) for _ in range(5)]
        answer = (
            await http.post("/api/chat", json={"model": "llama", "messages": user("Hello"), "stream": False})
        ).json()
        await asyncio.gather(*images)
    assert answer["total_duration"] < 40e9
