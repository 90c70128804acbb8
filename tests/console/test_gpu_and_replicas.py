"""The console's view of a GPU that engines share, of replicas, and of host names, in Chromium."""

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import expect

from gateway import config
from tests.console.harness import ADMIN, chromium, document, gateway, overflow, violations
from tests.fakes.running_gateway import Running, running, until
from tests.fakes.stand_ins import stand_in
from tests.integration.one_gpu import OLLAMA, VLLM

pytestmark = [pytest.mark.uvloop, pytest.mark.timeout(120)]  # a browser on a busy machine

NOWHERE = "http://127.0.0.1:1"
SMALLEST: dict[str, Any] = {"viewport": {"width": 320, "height": 640}, "locale": "ko-KR", "color_scheme": "dark"}
LAST = {"at": "2026-11-29T08:00:00Z", "from": "ollama", "to": "vllm", "seconds": 9.0}
GPU: dict[str, Any] = {
    "holder": None,
    "phase": "draining",
    "since": "2026-11-29T08:00:00Z",
    "seconds": 12.4,
    "from": "ollama",
    "to": "vllm",
    "expected_seconds": 29.6,
    "running": 2,
    "waiting": 5,
    "rollback": {"to": "ollama", "seconds": 5.4, "basis": "measured"},
    "last": None,
}
AT_REST = {"holder": "ollama", "phase": "ready", "from": None, "to": None, "expected_seconds": None}
REPLICAS: dict[str, Any] = {
    "replica": "gateway-1-0f3a",
    "redis": "redis.internal:6379/0",
    "up": True,
    "since": 1_700_000_000.5,
    "reason": None,
    "sharing": 3,
    "replicas": 3,
    "limits": [
        {"name": "vllm http://10.0.0.5:8000 slots", "limit": 24, "share": 8, "running": 7},
        {"name": f"vllm http://10.0.0.5:8000 model {'x' * 80}", "limit": 1000, "share": 334, "running": 0},
    ],
}

EJECTION = {
    "model": "m",
    "lane": "text",
    "state": "ejected",
    "reason": "status_5xx",
    "until": "2026-11-29T08:00:00Z",
    "gets_requests": True,
}


def processes(*states: str) -> list[dict[str, Any]]:
    return [
        {
            "replica": number,
            "pid": 4000 + number,
            "status": state,
            "running": {"ollama": number, "vllm": 0},
            "waiting": {"ollama": 0, "vllm": 10 * number},
        }
        for number, state in enumerate(states, 1)
    ]


class Shown:
    """What the status of a gateway tells of a GPU, of replicas and of host names."""

    def __init__(self, here: Running) -> None:
        self.gpu: dict[str, Any] | None = None
        self.replicas: dict[str, Any] | None = None
        self.processes: list[dict[str, Any]] | None = None
        self.shared: bool | None = None
        self.backends: dict[str, dict[str, Any]] = {}
        events, self._status = here.gateway._events, here.gateway._operations.status
        events._snapshot = self.status

    def status(self) -> dict[str, Any]:
        found = self._status()
        rollout = found["rollout"] | {"gpu": self.gpu, "shared": self.shared}
        backends = {name: backend | self.backends.get(name, {}) for name, backend in found["backends"].items()}
        more = {"rollout": rollout, "backends": backends, "replicas": self.replicas, "processes": self.processes}
        return found | more


@asynccontextmanager
async def shown() -> AsyncIterator[tuple[Running, Shown]]:
    async with running(config.build(document(NOWHERE, NOWHERE))) as here:
        yield here, Shown(here)


async def test_a_switch_of_the_gpu_is_followed_from_the_last_request_to_the_woken_engine(tmp_path: Path) -> None:
    file = str(tmp_path / "gpu.json")
    quick: dict[str, Any] = {"gpu_file": file, "load_seconds": 0.0, "sleep_seconds": 0.0, "wake_seconds": 0.0}
    async with AsyncExitStack() as stack:
        ollama, vllm = [await stack.enter_async_context(stand_in(replace(one, **quick))) for one in (OLLAMA, VLLM)]
        settings = config.build(
            {
                "llm_backend": "ollama",
                "exclusive": True,
                "backends": {"ollama": {"base_url": ollama.base_url}, "vllm": {"base_url": vllm.base_url}},
                "tiers": {"standard": {"models": {"ollama": "small", "vllm": "Small"}}},
                "admin_key": ADMIN,
                "state_file": "",
            }
        )
        here = await stack.enter_async_context(running(settings))
        page = await (await stack.enter_async_context(chromium())).page(here.base_url)
        panel = page.get_by_role("region", name="GPU", exact=True)
        note = page.get_by_role("region", name="Roll-out", exact=True).get_by_role("listitem")
        await expect(panel).to_contain_text("ollama has had the GPU since")
        await expect(note).to_have_count(0)
        endless = {"stream": True, "max_tokens": 30_000, "messages": [{"role": "user", "content": "repeat a"}]}
        async with here.sent(endless):
            await until(lambda: here.running == 1)
            here.gateway.rollout.set("vllm")
            await expect(note).to_have_text(re.compile(r"^GPU: Draining: ollama → vllm, for \d+ s"))
            await expect(panel.locator("[aria-current=step]")).to_have_text("Draining")
            await expect(panel.locator("dd").first).to_have_text("1")
        await expect(panel).to_contain_text("vllm has had the GPU since")
        await expect(note).to_have_count(0)
        await expect(page.get_by_role("article", name="Backend ollama")).to_contain_text("Sleeping")


async def test_each_phase_of_a_switch_is_shown_in_every_view_and_told_to_screen_readers() -> None:
    async with shown() as (here, status), chromium() as browser:
        status.gpu = GPU | AT_REST
        page = await browser.page(here.base_url)
        korean = await browser.page(here.base_url, **SMALLEST)
        panel = page.get_by_role("region", name="GPU", exact=True)
        await expect(panel.get_by_role("list")).to_have_count(0)
        await expect(panel).to_contain_text("A rollback to ollama would take about 6 s, as measured.")
        note = page.locator(".notes")
        words = {"draining": "Draining", "freeing": "Freeing the GPU", "waking": "Waking up"}
        for done, (phase, text) in enumerate(words.items()):
            status.gpu = GPU | {"phase": phase}
            await expect(note).to_have_text(f"GPU: {text}: ollama → vllm, for 12 s, about 30 s left")
            await expect(panel.locator("[aria-current=step]")).to_have_text(text)
            await expect(panel.locator(".done")).to_have_count(done)
            await expect(panel.locator("dd")).to_have_text(["2", "5"])
            await expect(page.locator("#announcer")).to_have_text(f"GPU: {text}")
        await expect(korean.locator(".notes")).to_have_text("GPU: 깨우는 중: ollama → vllm, 12초 경과, 약 30초 남음")
        assert await violations(page) == [] == await violations(korean)
        assert await overflow(korean) == 0
        await page.get_by_role("link", name="Activity").click()
        await expect(note).to_contain_text("Waking up")
        await page.get_by_role("link", name="Overview").click()
        status.gpu = GPU | AT_REST | {"last": LAST | {"outcome": "reversed", "why": ""}}
        await expect(panel).to_contain_text(re.compile(r"The switch to vllm at .* was reversed\."))
        failed = {"holder": None, "phase": "failed", "last": LAST | {"outcome": "failed", "why": "<b>no answer"}}
        status.gpu = GPU | AT_REST | failed
        await expect(note).to_have_text("GPU: No engine could be woken: for 12 s")
        await expect(panel).to_contain_text(re.compile(r"The switch to vllm at .* failed\. <b>no answer"))


async def test_processes_redis_and_host_names_are_shown_with_the_servers() -> None:
    async with shown() as (here, status), chromium() as browser:
        page = await browser.page(here.base_url, "/ops/#servers")
        korean = await browser.page(here.base_url, "/ops/#servers", **SMALLEST)
        region = page.get_by_role("region", name="Replicas")
        await expect(page.get_by_role("region", name="Backend vllm")).to_be_visible()
        await expect(region).to_have_count(0)

        status.processes = processes("ready", "ready", "draining")
        rows = region.get_by_role("group", name="Processes on this machine").get_by_role("row")
        await expect(rows).to_have_count(4)
        await expect(rows.nth(3)).to_have_text(
            re.compile("3.*4003.*Shutting down.*3 running, 0 waiting.*0.*30 waiting")
        )
        status.processes = processes("ready", "starting")
        await expect(rows).to_have_count(3)
        await expect(rows.nth(2)).to_contain_text("Starting")

        status.replicas, status.shared = REPLICAS, True
        limits = region.get_by_role("group", name="Shared limits").get_by_role("row")
        await expect(limits.nth(1)).to_have_text(re.compile("vllm http://10.0.0.5:8000 slots.*24.*8.*7"))
        await expect(region).to_contain_text(
            "Replicas that share their limits through Redis at redis.internal:6379/0: 3."
        )
        await expect(region).to_contain_text("This is replica gateway-1-0f3a.")
        status.processes = None
        await expect(region).to_contain_text("Requests and figures on this page are its own.")
        await expect(page.locator(".notes li")).to_have_count(0)

        status.replicas = REPLICAS | {"up": False, "reason": "ConnectionError", "sharing": 1}
        status.shared = False
        notes = page.locator(".notes li")
        await expect(notes).to_have_count(2)
        await expect(notes.first).to_contain_text("(ConnectionError). It goes on with 1/3 of each limit.")
        await expect(notes.last).to_contain_text("do not know of each other's changes")
        await expect(region.get_by_text("Not shared")).to_be_visible()

        (server,) = here.gateway._operations.status()["backends"]["ollama"]["servers"]
        well = {"up": True, "circuit": "closed", "gets_requests": True}
        badge = page.get_by_role("region", name="Backend ollama").locator(".head").first.locator(".badge")
        for change, one, two in (
            ({}, "Up", "Up"),
            ({"ejections": [EJECTION]}, "Ejected", "1 of 2 servers"),
            ({"gets_requests": False, "paused": True}, "Paused", "1 of 2 servers"),
            ({"up": False, "gets_requests": False}, "Down", "1 of 2 servers"),
        ):
            servers = [{**server, **well, **change}]
            status.backends["ollama"] = {"up": True, "servers": servers}
            await expect(badge).to_have_text(one)
            status.backends["ollama"] = {"up": True, "servers": [*servers, {**server, **well, "name": "other"}]}
            await expect(badge).to_have_text(two)

        name = {"name": "vllm.svc:8000", "resolved": False, "failure": "no answer in time", "servers": 3, "ignored": 2}
        status.backends["vllm"] = {"names": [name], "leaving": [{"name": "vllm#10.0.0.5:8000", "running": 4}]}
        backend = page.get_by_role("region", name="Backend vllm")
        await expect(backend).to_contain_text("Not resolved")
        await expect(backend).to_contain_text("Addresses beyond the limit: 2.")
        await expect(backend).to_contain_text(
            "The last lookup failed (no answer in time). The servers of before are used."
        )
        await expect(backend).to_contain_text(re.compile("vllm#10.0.0.5:8000 leaves.*still run there: 4"))
        await expect(korean.get_by_text("확인 실패")).to_be_visible()
        assert await violations(page) == []
        assert await overflow(korean) == 0


async def test_changes_within_one_millisecond_are_all_in_the_history_with_cause_and_replica() -> None:
    async with gateway() as here, chromium() as browser:
        page = await browser.page(here.base_url, "/ops/#activity")
        await expect(page.get_by_text("The roll-out has not changed yet.")).to_be_visible()
        rollout = here.gateway.rollout
        rollout.set("vllm", tier="standard", cause="guard")
        rollout.set("vllm", tier="pro", cause="exclusive")
        first, second = rollout.history
        rollout.history[1] = type(second)(first.at, "", "exclusive", second.tiers, replica="gateway-2")
        entries = page.locator(".history > li")
        await expect(entries).to_have_count(2)
        await expect(entries.nth(0)).to_contain_text(re.compile("GPU.*on replica gateway-2.*pro: ollama → vllm"))
        await expect(entries.nth(1)).to_contain_text(re.compile("Guard.*standard: ollama → vllm"))
