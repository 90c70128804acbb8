"""A gateway with traffic in front of stand-ins, and Chromium with its console."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

from gateway import config, simulate
from tests.fakes.running_gateway import Running, running
from tests.fakes.stand_ins import stand_in
from tests.programs import program

ADMIN = "an-admin-key"
VLLM_MODEL, OLLAMA_MODEL = "Qwen/Qwen3-VL-8B-Instruct", "qwen3-vl:8b"
SPEED = 60.0
"""Tokens per second of one stream."""
PATIENCE = 20_000
"""Milliseconds after which what is not on the page is a failure. A sample comes every two seconds."""

expect.set_options(timeout=PATIENCE)


def document(vllm: str, ollama: str, **more: Any) -> dict[str, Any]:
    models = {"ollama": OLLAMA_MODEL, "vllm": VLLM_MODEL}
    return {
        "llm_backend": "ollama",
        "backends": {
            "ollama": {"kind": "ollama", "base_url": ollama, "model_concurrency": 4},
            "vllm": {"kind": "vllm", "base_url": vllm},
        },
        "tiers": {
            "standard": {"models": models, "aliases": ["gpt-4o-mini"]},
            "pro": {"models": models},
            "private": {"models": {"ollama": OLLAMA_MODEL}, "backend": "ollama"},
        },
        "admin_key": ADMIN,
        "state_file": "",
        **more,
    }


@asynccontextmanager
async def gateway(**more: Any) -> AsyncIterator[Running]:
    """Run a gateway in front of an Ollama and a vLLM stand-in."""
    vllm = simulate.Options(
        "vllm", (simulate.Model(VLLM_MODEL, context_length=32768, tools=True),), tokens_per_second=SPEED
    )
    ollama = simulate.Options(
        "ollama", (simulate.Model(OLLAMA_MODEL, context_length=8192, tools=True),), parallel=4, tokens_per_second=SPEED
    )
    async with AsyncExitStack() as stack:
        one, two = await stack.enter_async_context(stand_in(vllm)), await stack.enter_async_context(stand_in(ollama))
        settings = config.build(document(one.base_url, two.base_url, **more))
        yield await stack.enter_async_context(running(settings, shares_loop=True))


@asynccontextmanager
async def traffic(here: Running, users: int = 6, **body: Any) -> AsyncIterator[None]:
    """Have users ask for streams, one after the other, during the block."""

    async def ask(number: int) -> None:
        turn = 0
        while True:
            turn += 1
            messages = [{"role": "user", "content": f"Question {number}, {turn}"}]
            with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                await here.ask({"messages": messages, "stream": True, "max_tokens": 40, **body})

    tasks = [asyncio.create_task(ask(number)) for number in range(users)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@dataclass
class Chromium:
    """The browser. Pages that are open note what their scripts complain of."""

    browser: Browser
    complaints: list[str] = field(default_factory=list)

    async def page(self, base_url: str, path: str = "/ops/", *, key: str | None = ADMIN, **options: Any) -> Page:
        """Open the console in a context of its own, with the admin key."""
        context = await self.browser.new_context(**{"locale": "en-US", "reduced_motion": "reduce", **options})
        if key is not None:
            await context.add_init_script(f"sessionStorage.setItem('gateway-admin-key', {key!r})")
        page = await context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._note)
        await page.goto(base_url + path)
        return page

    def _note(self, message: ConsoleMessage) -> None:
        # Answers other than success are no complaint of a script.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)


@asynccontextmanager
async def chromium() -> AsyncIterator[Chromium]:
    """Start Debian's Chromium. At the end no script of a page may have complained."""
    executable = program("chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        found = Chromium(browser)
        try:
            yield found
        finally:
            await browser.close()
        assert found.complaints == []


async def overflow(page: Page) -> int:
    """Return by how many pixels the page is wider than its window, so that it has to be scrolled sideways.

    Not `innerWidth`: on a phone it grows with the page.
    """
    assert page.viewport_size is not None
    return max(0, int(await page.evaluate("document.documentElement.scrollWidth")) - page.viewport_size["width"])


async def violations(page: Page) -> list[str]:
    """Return what axe finds on the page: barriers for people who cannot see it or use no mouse."""
    results = await Axe().run(page)
    return [f"{found['id']}: {found['nodes'][0]['html']}" for found in results.response["violations"]]
