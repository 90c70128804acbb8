"""The console in Chromium, in front of a gateway with traffic on stand-ins."""

import asyncio
import re
from typing import Any

import httpx2
import pytest
from playwright.async_api import Page, expect

from gateway import config
from gateway.engines.engine import ModelFacts
from tests.console.harness import (
    ADMIN,
    OLLAMA_MODEL,
    VLLM_MODEL,
    chromium,
    document,
    gateway,
    overflow,
    traffic,
    violations,
)
from tests.fakes.running_gateway import Running, running, until

pytestmark = [pytest.mark.uvloop, pytest.mark.timeout(120)]  # a browser on a busy machine

VIEWS = ("overview", "servers", "activity", "try")
SMALLEST: dict[str, Any] = {"viewport": {"width": 320, "height": 640}, "is_mobile": True, "has_touch": True}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
NOWHERE = "http://127.0.0.1:1"


async def tokens_per_second(page: Page, backend: str) -> float:
    text = await page.get_by_role("article", name=f"Backend {backend}", exact=True).locator("dd").first.inner_text()
    return float(text.replace(",", ""))


async def drag(page: Page, percent: int) -> None:
    """Drag the slider of the canary with the mouse."""
    slider = page.get_by_role("slider", name="Canary")
    await slider.scroll_into_view_if_needed()
    box = await slider.bounding_box()
    assert box is not None
    thumb = 16
    x = box["x"] + thumb / 2 + (box["width"] - thumb) * percent / 100
    y = box["y"] + box["height"] / 2
    await page.mouse.move(box["x"] + thumb / 2, y)
    await page.mouse.down()
    await page.mouse.move(x - 30, y, steps=4)
    await page.mouse.move(x, y, steps=2)
    await page.mouse.up()


def assignments(here: Running) -> dict[str, str]:
    return {name: str(route.assignment) for name, route in here.gateway.rollout.tiers.items()}


async def test_an_operator_sees_the_load_drags_a_canary_and_rolls_back_with_one_button() -> None:
    async with gateway() as here, traffic(here), chromium() as browser:
        page = await browser.page(here.base_url)
        lane = page.get_by_role("article", name="Backend ollama").get_by_role("listitem").filter(has_text="running")
        await expect(lane).to_contain_text(re.compile("4 running, [1-9] waiting"))
        await expect(page.get_by_text("All 2 tiers on ollama", exact=True)).to_be_visible()
        await expect(page.get_by_role("img", name=re.compile(r"Time to first token.*ollama: \d"))).to_be_visible()
        assert await tokens_per_second(page, "vllm") == 0

        await drag(page, 50)
        share = float(await page.get_by_label("Percent on the canary").input_value())
        assert 40 <= share <= 60
        await expect(page.locator(".preview")).to_have_text(f"Will be on ollama, {share:g} % on vllm.")
        await page.get_by_role("button", name="Review change").click()
        dialog = page.get_by_role("dialog")
        await expect(dialog).to_contain_text("breaks nothing on vllm that was checked")
        assert assignments(here)["standard"] == "ollama"
        await dialog.get_by_role("button", name="Apply", exact=True).click()
        await expect(dialog).to_contain_text(f"standard: ollama → ollama, {share:g} % on vllm")
        await dialog.get_by_role("button", name="Close").click()
        assert assignments(here)["standard"] == assignments(here)["pro"] == f"ollama with {share:g} % on vllm"
        await expect(page.locator(".sentence")).to_have_text(f"All 2 tiers on ollama, {share:g} % on vllm")
        for _ in range(100):
            if await tokens_per_second(page, "vllm") > 10:
                break
            await asyncio.sleep(0.1)
        assert await tokens_per_second(page, "vllm") > 10

        rollback = page.get_by_role("button", name="Roll back to ollama")
        await rollback.focus()
        await page.keyboard.press("Enter")
        result = page.locator(".toast")
        await expect(result).to_contain_text("Rolled back")
        await expect(result).to_contain_text(f"standard: ollama, {share:g} % on vllm → ollama")
        assert assignments(here)["standard"] == "ollama"
        await result.get_by_role("button", name="Undo").click()
        await expect(result).to_contain_text("Last change undone")
        assert assignments(here)["standard"] == f"ollama with {share:g} % on vllm"
        await page.get_by_role("link", name="Activity").click()
        await expect(page.locator(".history > li")).to_have_count(3)
        await expect(page.locator(".history > li").nth(1)).to_contain_text("Rollback")


async def test_a_switch_that_would_break_a_tier_says_so_first_and_can_be_forced_or_left() -> None:
    models = {"ollama": OLLAMA_MODEL, "vllm": "not-there"}
    async with gateway(tiers={"standard": {"models": models}}) as here, chromium() as browser:
        page = await browser.page(here.base_url)
        await page.get_by_role("radio", name="vllm").check()
        await page.get_by_role("button", name="Review change").click()
        dialog = page.get_by_role("dialog")
        await expect(dialog).to_contain_text("would break a tier on vllm")
        await expect(dialog.locator(".badge", has_text="Breaks").first).to_be_visible()
        await dialog.get_by_role("button", name="Cancel").click()
        assert assignments(here) == {"standard": "ollama"}
        await page.get_by_role("button", name="Review change").click()
        await dialog.get_by_role("button", name="Apply anyway").click()
        await expect(dialog).to_contain_text("standard: ollama → vllm")
        assert assignments(here) == {"standard": "vllm"}
        # The way back is not checked.
        await dialog.get_by_role("button", name="Close").click()
        await page.get_by_role("radio", name="ollama").check()
        await page.get_by_role("button", name="Review change").click()
        await expect(dialog).to_contain_text("needs no check")
        await page.keyboard.press("Enter")
        await expect(dialog).to_contain_text("standard: vllm → ollama")
        await page.keyboard.press("Escape")
        await expect(dialog).to_be_hidden()


async def test_no_view_has_a_barrier_in_light_or_dark_in_english_or_korean() -> None:
    looks: list[dict[str, Any]] = [
        {"color_scheme": "light", "locale": "en-US"},
        {"color_scheme": "dark", "locale": "ko-KR", **PHONE},
    ]
    async with gateway(guard={}) as here, traffic(here), chromium() as browser:
        await here.ask({"model": "nothing-there"})
        operator = here.gateway.rollout
        operator.set("vllm", None, tier="pro")
        for look in looks:
            page = await browser.page(here.base_url, **look)
            await expect(page.locator(".backend")).to_have_count(2)
            assert await page.evaluate("document.documentElement.lang") == look["locale"][:2]
            for view in VIEWS:
                await page.evaluate(f"location.hash = '{view}'")
                await expect(page.locator(f"nav a[href='#{view}'][aria-current=page]")).to_be_visible()
                if view == "overview":
                    await expect(page.locator(".plot canvas").first).to_be_visible()
                assert await violations(page) == [], (view, look)
                assert await overflow(page) == 0, (view, look)
            if look["locale"] == "en-US":
                await page.evaluate("location.hash = 'overview'")
                await page.locator("#scope").select_option("standard")
                await page.get_by_role("radio", name="vllm").check()
                await page.get_by_role("button", name="Review change").click()
                await expect(page.get_by_role("dialog").locator(".verdict")).to_be_visible()
                assert await violations(page) == []
        page = await browser.page(here.base_url, key=None)
        await expect(page.get_by_label("Admin key")).to_be_focused()
        assert await violations(page) == []


async def test_a_wrong_key_is_refused_and_the_right_one_is_kept_for_the_tab() -> None:
    async with gateway() as here, chromium() as browser:
        page = await browser.page(here.base_url, key=None)
        field = page.get_by_label("Admin key")
        for wrong in ("wrong", "schlüssel"):
            await field.fill(wrong)
            await field.press("Enter")
            await expect(field).to_have_attribute("aria-invalid", "true")
        await expect(page.get_by_role("alert")).to_have_text("The gateway does not accept this key.")
        await field.fill(ADMIN)
        await field.press("Enter")
        await expect(page.get_by_role("heading", name="Backends")).to_be_visible()
        await page.reload()
        await expect(page.get_by_role("heading", name="Backends")).to_be_visible()
        assert ADMIN not in await page.content()
        assert await page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href") == (
            f"{{}}{here.base_url}/ops/"
        )
        await page.get_by_role("button", name="Forget key").click()
        await expect(field).to_be_visible()
        assert await page.evaluate("sessionStorage.length") == 0


async def test_an_open_gateway_asks_a_browser_on_its_machine_for_no_key() -> None:
    async with running(config.build(document(NOWHERE, NOWHERE, admin_key=None))) as here, chromium() as browser:
        page = await browser.page(here.base_url, key=None)
        await page.get_by_role("button", name="Roll back to ollama").click()
        await expect(page.locator(".toast")).to_contain_text("Nothing changed")
        await expect(page.get_by_role("button", name="Forget key")).to_be_hidden()
        # A page that a proxy serves to others says why it has no access.
        await page.set_extra_http_headers({"x-forwarded-for": "192.0.2.1"})
        await page.reload()
        await expect(page.get_by_role("alert")).to_contain_text("only programs on the gateway's own machine")


async def test_a_lost_gateway_is_shown_and_a_new_one_is_found_and_may_have_another_key() -> None:
    settings = config.build(document(NOWHERE, NOWHERE))
    async with chromium() as browser:
        async with running(settings) as here:
            port = here.port
            page = await browser.page(here.base_url)
            rollback = page.get_by_role("button", name="Roll back to ollama")
            await expect(rollback).to_be_enabled()
            for connection in list(here.server.server_state.connections):
                connection.transport.abort()  # type: ignore[union-attr]
            await expect(page.locator(".pill")).to_have_text("Live")  # connected again by itself
        await expect(page.locator(".pill")).to_have_text("Disconnected")
        await expect(page.locator(".banner")).to_contain_text("These figures are from")
        assert await violations(page) == []
        await expect(page.get_by_role("button", name="Undo")).to_be_disabled()
        await rollback.click()  # an emergency may be tried at any time
        await expect(page.locator(".toast")).to_contain_text("The gateway cannot be reached.")
        await expect(page.get_by_role("heading", name="Backends")).to_be_visible()
        async with running(settings, port=port):
            await expect(page.locator(".pill")).to_have_text("Live")
            await expect(rollback).to_be_enabled()
        async with running(config.build(document(NOWHERE, NOWHERE, admin_key="another")), port=port):
            await expect(page.get_by_label("Admin key")).to_be_visible()
            await expect(page.get_by_role("alert")).to_have_text("The gateway does not accept this key.")


HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
"""A name that a server may report for a model; the settings do not let it into the names of tiers."""


async def test_hostile_and_very_long_names_stay_text() -> None:
    models = {"ollama": HOSTILE + "y" * 400, "vllm": "m'\"><svg onload=alert(3)>"}
    tiers = {name: {"models": models} for name in ("constructor", "toString", "a/b", "x" * 128)}
    async with running(config.build(document(NOWHERE, NOWHERE, tiers=tiers))) as here, chromium() as browser:
        servers = here.gateway._backends["vllm"].servers
        servers[0].update_models({HOSTILE: ModelFacts(), "z" * 4000: ModelFacts()})
        names = ("small", "small:latest", "other:latest")
        here.gateway._backends["ollama"].servers[0].update_models({name: ModelFacts() for name in names})
        page = await browser.page(here.base_url, **SMALLEST)
        dialogs: list[str] = []
        page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        for name in tiers:
            await expect(page.get_by_role("heading", name=name, exact=True)).to_have_count(1)
        here.gateway.rollout.set("vllm", tier="constructor")
        here.gateway.rollout.set("vllm", tier="toString")
        await expect(page.locator(".sentence")).to_contain_text("constructor, toString: vllm")
        await here.ask({"model": "constructor"})
        for view in VIEWS:
            await page.evaluate(f"location.hash = '{view}'")
            await expect(page.locator(f"nav a[href='#{view}'][aria-current=page]")).to_be_visible()
            assert await overflow(page) == 0, view
            await expect(page.locator("nav a[aria-current=page]")).to_be_in_viewport(ratio=0.9)
        await page.evaluate("location.hash = 'servers'")
        await expect(page.locator(".server .model", has_text=HOSTILE)).to_have_count(1)
        reported = page.get_by_role("region", name="Backend ollama").locator(".model")
        await expect(reported.filter(has_text=re.compile("^(small|other)"))).to_have_text(["other:latest", "small"])
        await page.evaluate("location.hash = 'activity'")
        await expect(page.locator("tbody")).to_contain_text("constructor")
        row = await page.locator("tbody tr").first.bounding_box()
        assert row is not None
        assert row["height"] < 150  # the id of a request is not broken into letters
        assert await page.locator("main img, main script, main b, main svg").count() == 0
        assert dialogs == []


async def test_two_sides_answer_the_same_question_beside_each_other() -> None:
    async with gateway() as here, chromium() as browser:
        page = await browser.page(here.base_url, "/ops/#try")
        await page.get_by_label("Message").fill("<img src=x onerror=alert(1)> Hello?")
        await page.keyboard.press("Enter")
        for backend, model in (("ollama", OLLAMA_MODEL), ("vllm", VLLM_MODEL)):
            pane = page.get_by_role("region", name=f"Backend {backend}")
            await expect(pane.locator(".head .model")).to_have_text(model)
            await expect(pane.locator(".said")).to_have_text("<img src=x onerror=alert(1)> Hello?")
            await expect(pane.locator(".answer")).to_contain_text(re.compile(r"First token after .* tokens/s"))
            await expect(pane.locator(".answer .text").nth(1)).to_contain_text("<img src=x onerror=alert(1)> Hello?")
        served = [line["backend"] for line in here.exchanges()]
        assert sorted(served) == ["ollama", "vllm"]
        assert await page.locator(".talk img").count() == 0
        # One side alone, and an answer that is stopped.
        await page.get_by_role("checkbox", name="Ask ollama").uncheck()
        await page.get_by_label("Message").fill("Again?")
        await page.get_by_role("button", name="Send").click()
        await expect(page.get_by_role("region", name="Backend vllm").locator(".answer")).to_have_count(2)
        await expect(page.get_by_role("region", name="Backend ollama").locator(".answer")).to_have_count(1)


async def test_two_hundred_tiers_can_be_filtered_and_changed_one_by_one() -> None:
    models = {"ollama": OLLAMA_MODEL, "vllm": VLLM_MODEL}
    tiers = {f"tier-{number}": {"models": models} for number in range(200)}
    async with running(config.build(document(NOWHERE, NOWHERE, tiers=tiers))) as here, chromium() as browser:
        page = await browser.page(here.base_url)
        await expect(page.locator(".tier")).to_have_count(200)
        await page.get_by_label("Filter tiers and models").fill("tier-19")
        await expect(page.locator(".tier")).to_have_count(11)
        await page.get_by_role("button", name="Change tier tier-199").click()
        await expect(page.locator("#scope")).to_be_focused()
        await page.get_by_role("radio", name="vllm").check()
        await page.get_by_role("button", name="Review change").click()
        await page.get_by_role("dialog").get_by_role("button", name=re.compile("Apply")).click()
        await until(lambda: assignments(here)["tier-199"] == "vllm")
        await expect(page.locator(".sentence")).to_contain_text("199 tiers: ollama")


FOCUSED = """() => {
    const focused = document.activeElement, box = focused.getBoundingClientRect();
    const seen = document.elementFromPoint(box.left + Math.min(box.width / 2, 20), box.top + box.height / 2);
    const isSeen = seen !== null && (focused.contains(seen) || seen.contains(focused));
    const isMarked = getComputedStyle(focused).outlineStyle !== "none";
    const name = focused.tagName + " " + (focused.getAttribute("aria-label") ?? focused.textContent);
    return [focused === document.body, isSeen && isMarked, name];
}"""


async def walk(page: Page, key: str) -> tuple[int, list[str]]:
    """Press `key` until the focus leaves the page. Return the steps, and what had the focus unseen."""
    unseen: list[str] = []
    for step in range(200):
        await page.keyboard.press(key)
        is_over, is_seen, name = await page.evaluate(FOCUSED)
        if is_over:
            return step, unseen
        if not is_seen:
            unseen.append(name)
    raise AssertionError("the focus never leaves the page")


@pytest.mark.parametrize(("width", "height"), [(1280, 700), (320, 640)])
async def test_with_the_keyboard_alone_the_focus_is_always_seen(width: int, height: int) -> None:
    models = {"ollama": OLLAMA_MODEL, "vllm": VLLM_MODEL}
    tiers = {f"tier-{number}": {"models": models} for number in range(9)}
    async with running(config.build(document(NOWHERE, NOWHERE, tiers=tiers))) as here, chromium() as browser:
        page = await browser.page(here.base_url, viewport={"width": width, "height": height})
        await expect(page.locator(".tier")).to_have_count(9)
        for key in ("Tab", "Shift+Tab"):
            steps, unseen = await walk(page, key)
            assert unseen == [], key
            assert steps > 20


KEYS = {
    "day": "2026-11-29",
    "keys": [
        {
            "name": "web<b>",
            "tiers": ["standard"],
            "priority": "interactive",
            "expires": None,
            "expired": False,
            "limits": {"requests_per_minute": 600},
            "used": {"requests_per_minute": 12},
        }
    ],
}
USAGE = {"rows": [{"key": "web<b>", "requests": 1234, "refused": 5, "prompt_tokens": 10, "completion_tokens": 20}]}


async def test_keys_and_their_use_are_shown_where_the_gateway_has_them() -> None:
    async with running(config.build(document(NOWHERE, NOWHERE))) as here, chromium() as browser:
        page = await browser.page(here.base_url, "/ops/#keys")
        await expect(page.get_by_role("heading", name="Backends")).to_be_visible()
        await expect(page.get_by_role("link", name="Keys")).to_be_hidden()
        await page.route("**/ops/keys", lambda route: route.fulfill(json=KEYS))
        await page.route("**/ops/usage?by=key", lambda route: route.fulfill(json=USAGE))
        await page.reload()
        limits = page.get_by_role("region", name="Keys and limits").get_by_role("row")
        await expect(limits.nth(1)).to_contain_text("web<b>")
        await expect(limits.nth(1)).to_contain_text("Requests per minute: 600")
        await expect(page.get_by_role("region", name="Usage").get_by_role("row").nth(1)).to_contain_text("1,234")
        assert await violations(page) == []


async def test_language_and_colours_can_be_chosen() -> None:
    async with running(config.build(document(NOWHERE, NOWHERE))) as here, chromium() as browser:
        page = await browser.page(here.base_url, color_scheme="light")
        await page.get_by_label("Colours").select_option("dark")
        assert await page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(14, 17, 22)"
        await page.get_by_label("Language").select_option("ko")
        await expect(page.get_by_role("button", name="ollama(으)로 롤백")).to_be_visible()
        await expect(page.locator("html")).to_have_attribute("lang", "ko")
        await expect(page.locator("html")).to_have_attribute("data-theme", "dark")


async def test_the_page_works_behind_a_proxy_with_a_path_of_its_own_that_holds_events_back() -> None:
    """All addresses of the page are relative, and it asks for the status where no events come."""
    async with (
        running(config.build(document(NOWHERE, NOWHERE))) as here,
        chromium() as browser,
        httpx2.AsyncClient(base_url=here.base_url, verify=False) as client,
    ):

        async def forward(route: Any) -> None:
            path = route.request.url.partition("/llm")[2]
            if path == "/ops/events":
                await route.abort()
                return
            headers = {name: value for name, value in route.request.headers.items() if name == "authorization"}
            answer = await client.get(path, headers=headers)
            await route.fulfill(status=answer.status_code, headers=dict(answer.headers), body=answer.content)

        context = await browser.browser.new_context()
        await context.add_init_script(f"sessionStorage.setItem('gateway-admin-key', {ADMIN!r})")
        await context.route("http://proxy.test/llm/**", forward)
        page = await context.new_page()
        await page.goto("http://proxy.test/llm/ops/")
        await expect(page.locator(".sentence")).to_have_text("All 2 tiers on ollama")
        here.gateway.rollout.set("vllm")
        await expect(page.locator(".sentence")).to_have_text("All 2 tiers on vllm")
        asked = await page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert asked
        assert all(name.startswith("http://proxy.test/llm/ops/") for name in asked)
