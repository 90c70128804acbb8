"""Files of keys that change while the gateway runs: reread, and never the way to an open gateway.

Covers: gateway/config/reload.py
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway import config
from gateway.config import reload
from gateway.config.reload import FileWatcher
from tests.config.test_reload import Watched, write_in_place
from tests.fakes.running_gateway import until


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "STABLE_SECONDS", 0.1)
    monkeypatch.setattr(reload, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(reload, "STEP_SECONDS", 0.05)


OLD, NEW, NEWER = (f"{name}-key-0123456789abcdef" for name in ("old", "new", "newer"))


@asynccontextmanager
async def watching_keys(file: Path | None, environ: dict[str, str]) -> AsyncIterator[Watched]:
    watched = Watched(Path("unused"), lambda: config.load(file, environ))
    reloader = reload.Reloader(lambda: watched.settings, watched.apply, watched.results.append)
    watcher = FileWatcher(file, reloader, watched.read, lambda: reload.files_of_keys(watched.settings))
    task = asyncio.create_task(watcher.run())
    try:
        await asyncio.sleep(0.4)  # the first check
        assert watched.results == []
        yield watched
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def client_keys(watched: Watched) -> list[str]:
    return [key.get_secret_value() for key in watched.settings.api_keys]


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secrets").mkdir()
    keys = tmp_path / "secrets" / "keys"
    keys.write_text(f"{OLD}\n")
    return keys


@pytest.mark.parametrize("with_settings_file", [False, True])
async def test_file_of_client_keys_is_reread_when_it_changes(keys: Path, with_settings_file: bool) -> None:
    file = None
    if with_settings_file:
        file = Path("gateway.yaml")
        write_in_place(file, 1)
    async with watching_keys(file, {"GATEWAY_API_KEYS_FILE": str(keys)}) as watched:
        keys.write_text(f"{OLD}\n{NEW}\n")
        await until(lambda: client_keys(watched) == [OLD, NEW])
        other = keys.with_name("other")
        other.write_text(f"{NEWER}\n")
        other.replace(keys)
        await until(lambda: client_keys(watched) == [NEWER])
        assert [(outcome["cause"], outcome["changed"]) for outcome in watched.results] == [
            ("file", ["api_keys: changed"])
        ] * 2


@pytest.mark.parametrize("wrong", [None, "", "# none\n", f"{NEW}\n{NEW} x\n", f'"{NEW}"\n'])
async def test_wrong_file_of_client_keys_leaves_the_old_keys_and_says_so(
    keys: Path, wrong: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with watching_keys(None, {"GATEWAY_API_KEYS_FILE": str(keys)}) as watched:
        if wrong is None:
            keys.unlink()
        else:
            keys.write_text(wrong)
        await until(lambda: f"{keys}" in caplog.text)
        await asyncio.sleep(0.5)
        assert "nothing changes" in caplog.text or "the old ones stay in force" in caplog.text
        assert client_keys(watched) == [OLD]
        assert NEW not in caplog.text
        keys.write_text(f"{NEWER}\n")
        await until(lambda: client_keys(watched) == [NEWER])


async def test_settings_file_that_changes_while_the_keys_are_missing_is_refused(keys: Path) -> None:
    """The settings as a whole are wrong then, and the reason names the file."""
    file = Path("gateway.yaml")
    file.write_text(f"heartbeat: 1\napi_keys_file: {keys}\n")
    async with watching_keys(file, {}) as watched:
        keys.unlink()
        file.write_text(f"heartbeat: 2\napi_keys_file: {keys}\n")
        await until(lambda: len(watched.results) == 1)
        assert f"api_keys_file: '{keys}': No such file or directory" in watched.results[0]["reasons"][0]
        assert (watched.heartbeat, client_keys(watched)) == (1.0, [OLD])


async def test_keys_are_not_reread_while_the_settings_file_is_missing(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it, the settings would be the defaults. What was missed is made up for."""
    file = Path("gateway.yaml")
    text = f"heartbeat: 3\napi_keys_file: {keys}\n"
    file.write_text(text)
    async with watching_keys(file, {}) as watched:
        file.write_text("")
        keys.write_text(f"{NEW}\n")
        await until(lambda: "the settings file gateway.yaml is missing, empty or unreadable" in caplog.text)
        await asyncio.sleep(0.5)
        assert (watched.heartbeat, client_keys(watched), watched.results) == (3.0, [OLD], [])
        file.write_text(text)
        await until(lambda: client_keys(watched) == [NEW])


async def test_another_file_of_client_keys_is_watched_from_then_on(keys: Path) -> None:
    file = Path("gateway.yaml")
    file.write_text(f"api_keys_file: {keys}\n")
    Path("elsewhere").mkdir()
    other = Path("elsewhere/keys")
    other.write_text(f"{NEW}\n")
    async with watching_keys(file, {}) as watched:
        file.write_text("api_keys_file: elsewhere/keys\n")
        await until(lambda: client_keys(watched) == [NEW])
        await asyncio.sleep(0.5)
        other.write_text(f"{NEWER}\n")
        await until(lambda: client_keys(watched) == [NEWER])
        keys.write_text(f"{NEW}\n")
        await asyncio.sleep(0.5)
        assert len(watched.results) == 2


async def test_key_file_of_a_backend_is_reread_when_it_changes(keys: Path) -> None:
    file = Path("gateway.yaml")
    file.write_text(f"backends: {{vllm: {{api_key_file: {keys}}}}}\n")
    async with watching_keys(file, {}) as watched:
        keys.write_text(f"{NEW}\n")
        await until(lambda: watched.settings.backends["vllm"].api_key == SecretStr(NEW))
        assert watched.results[0]["changed"] == ["backends.vllm.api_key: changed"]
