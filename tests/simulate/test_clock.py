"""Pretended time: its scale, and pictures that slow each other down as measured on an older Ollama."""

import asyncio
from typing import Any

import pytest

from gateway.simulate import SEED_SLOWDOWN, Options, Running, running
from tests.golden import picture
from tests.simulate.doors import client, user

SCALE = 0.002  # 51 s take a tenth of a second


def options(scale: float = SCALE, **more: Any) -> Options:
    return Options("ollama", image_seconds=51, time_scale=scale, **more)


async def look(server: Running, model: str = "qwen3-vl") -> float:
    """The pretended seconds that one picture takes, by the answer's own account."""
    messages = [{"role": "user", "content": "What is it?", "images": [picture()]}]
    async with client(server) as http:
        return (
            float(
                (await http.post("/api/chat", json={"model": model, "messages": messages, "stream": False})).json()[
                    "total_duration"
                ]
            )
            / 1e9
        )


async def timed(*work: Any) -> float:
    """Seconds until all of `work` is done."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await asyncio.gather(*work)
    return loop.time() - began


async def test_time_scale_shortens_what_is_waited_and_not_what_is_told() -> None:
    async with running(options()) as server:
        assert 51 <= await look(server) < 80


@pytest.mark.parametrize(("slowdown", "least"), [(0.0, 255.0), (SEED_SLOWDOWN, 397.2)])
async def test_five_pictures_at_once_take_as_long_as_measured(slowdown: float, least: float) -> None:
    scale = SCALE * 4  # what the five requests themselves cost is little beside the time that passes
    async with running(options(scale, image_slowdown=slowdown)) as server:
        assert least <= await timed(*(look(server) for _ in range(5))) / scale < least * 1.25


async def test_ten_pictures_at_once_all_take_more_than_ten_minutes() -> None:
    async with running(options(image_slowdown=SEED_SLOWDOWN)) as server:
        assert min(await asyncio.gather(*(look(server) for _ in range(10)))) > 600


async def test_one_picture_after_the_other_is_not_slowed_down() -> None:
    async with running(options(image_slowdown=SEED_SLOWDOWN)) as server:
        assert all([51 <= await look(server) < 80 for _ in range(3)])


async def test_text_is_not_slowed_down_by_pictures() -> None:
    async with running(options(image_slowdown=SEED_SLOWDOWN)) as server, client(server) as http:
        pictures = [asyncio.create_task(look(server)) for _ in range(5)]
        answer = (
            await http.post("/api/chat", json={"model": "llama", "messages": user("Hello"), "stream": False})
        ).json()
        await asyncio.gather(*pictures)
    assert answer["total_duration"] < 40e9


def test_settings_are_read_by_the_names_of_the_options() -> None:
    read = Options("ollama").with_settings(["memory=100", "image_slowdown=0.14", "gpu=yes", "repeat_word=stutter"])
    assert (read.memory, read.image_slowdown, read.gpu, read.repeat_word) == (100, 0.14, True, "stutter")


@pytest.mark.parametrize("setting", ["memory", "nothing=1", "gpu=1", "memory=x", "kind=vllm", "models=a"])
def test_setting_that_sets_nothing_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=r"sets nothing|yes or no|invalid literal"):
        Options("ollama").with_settings([setting])
