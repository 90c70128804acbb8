"""Client of `/ops`: how the commands find a gateway, authenticate, and report what goes wrong."""

import asyncio
from pathlib import Path

import pytest

from gateway.cli.ops_client import OpsClient
from tests.cli.harness import command, gateway
from tests.fakes.fault_backend import FaultBackend

ADMIN = "admin-key"

pytestmark = pytest.mark.usefixtures("empty_environment")


async def test_refusal_of_the_gateway_is_printed_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch):
        for words, message in (
            (("switch", "nowhere"), "'backend' must be one of: ollama, vllm, away. (400 invalid_value)"),
            (("switch", "vllm", "--tier", "pinned", "--force"), "(409 conflict)"),
            (("rollback", "--tier", "nothing"), "'tier' must be one of"),
        ):
            result = await command(*words)
            assert (result.exit_code, result.stdout) == (1, "")
            assert message in result.stderr


async def test_admin_key_is_sent_and_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch, admin_key=ADMIN):
        refused = await command("rollback")
        assert (refused.exit_code, "GATEWAY_ADMIN_KEY" in refused.stderr) == (1, True)
        assert (await command("rollback", GATEWAY_ADMIN_KEY=ADMIN)).exit_code == 0
        Path(".env").write_text(f"GATEWAY_ADMIN_KEY={ADMIN}\n")
        assert (await command("rollback")).exit_code == 0


async def test_missing_or_stale_token_is_explained_and_no_other_machine_gets_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with gateway(monkeypatch, admin_key=ADMIN) as here:
        file = Path(f"gateway-admin-token-{here.port}").absolute()
        missing = (await command("status")).stderr
        assert f"its admin token cannot be read from {file} (No such file or directory)" in missing
        file.write_text("of-another-run")
        stale = (await command("status")).stderr
        assert f"the admin token in {file} is not this gateway's" in stale
        assert "of-another-run" not in stale
        assert (await command("status", GATEWAY_ADMIN_KEY=ADMIN)).exit_code == 0
        url = f"http://gateway.example:{here.port}"
        monkeypatch.setenv("GATEWAY_URL", url)
        assert OpsClient.of_settings(None)._headers == {}
        monkeypatch.setenv("GATEWAY_URL", here.base_url)
        assert OpsClient.of_settings(None)._headers == {"authorization": "Bearer of-another-run"}


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:81"])
def test_token_is_read_beside_the_state_file_that_the_settings_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str | None
) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "gateway-admin-token-81").write_text("the-token")
    (tmp_path / "mine.yaml").write_text(f"port: 81\nstate_file: {folder}/state.json\n")
    if url is not None:
        monkeypatch.setenv("GATEWAY_URL", url)
    assert OpsClient.of_settings(tmp_path / "mine.yaml")._headers == {"authorization": "Bearer the-token"}
    monkeypatch.setenv("GATEWAY_URL", "http://127.0.0.1:81")
    monkeypatch.setenv("GATEWAY_STATE_FILE", f"{folder}/state.json")
    monkeypatch.setenv("GATEWAY_PORT", "much")  # invalid settings
    assert OpsClient.of_settings(None)._headers == {"authorization": "Bearer the-token"}


async def test_without_gateway_url_the_address_comes_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch, admin_key=ADMIN) as here:
        monkeypatch.delenv("GATEWAY_URL")
        Path("mine.yaml").write_text(f"host: 0.0.0.0\nport: {here.port}\nadmin_key: {ADMIN}\napi_keys: [a]\n")
        assert (await command("status", "--config", "mine.yaml")).exit_code == 0
        assert (await command("status", GATEWAY_CONFIG="mine.yaml")).exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("switch", "vllm"),
        ("switch", "vllm", "--force"),
        ("verify", "--preflight"),
        ("rollback",),
        ("undo",),
    ],
)
async def test_gateway_that_cannot_be_reached_exits_with_1_and_one_line(words: tuple[str, ...]) -> None:
    result = await command(*words, GATEWAY_URL="http://127.0.0.1:1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        result.stderr == "cannot reach a gateway at http://127.0.0.1:1; start it, or set GATEWAY_URL to its address\n"
    )


async def test_connection_that_breaks_off_is_not_a_gateway_that_cannot_be_reached() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        result = await command("status", GATEWAY_URL=url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"the server at {url} did not answer (RemoteProtocolError); see the gateway's log\n"


async def test_server_that_is_not_a_gateway_exits_with_1_and_one_line() -> None:
    async with FaultBackend("vllm") as other:
        for mode in ("healthy", "html"):
            other.mode = mode
            result = await command("status", GATEWAY_URL=other.base_url)
            assert result.exit_code == 1
            assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (("status",), {"GATEWAY_URL": "ftp://x"}, "GATEWAY_URL"),
        (("status",), {"GATEWAY_PORT": "much"}, "set GATEWAY_URL and GATEWAY_ADMIN_KEY"),
        (("status",), {"GATEWAY_PORT": "0"}, "GATEWAY_URL"),
        (("switch",), {}, "BACKEND"),
        (("switch", "vllm", "--canary", "101"), {}, "canary"),
        (("rollback", "vllm"), {}, "vllm"),
    ],
)
async def test_invalid_arguments_and_settings_exit_with_2(
    words: tuple[str, ...], variables: dict[str, str], message: str
) -> None:
    result = await command(*words, **variables)
    assert result.exit_code == 2
    assert message in result.stderr


async def test_with_gateway_url_invalid_settings_do_not_prevent_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator may be editing `.env` when the gateway has to be rolled back."""
    async with gateway(monkeypatch):
        assert (await command("rollback", LLM_BACKEND="nowhere")).exit_code == 0
