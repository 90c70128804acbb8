"""`gateway keys`: what the commands print and write, and a running gateway that follows them.

Covers: gateway/cli/keys_commands.py
"""

import asyncio
import json
import re
import stat
from pathlib import Path

import pytest

from gateway.config import reload
from gateway.keys.file import read_policies
from gateway.serve import _watching_keys
from tests.cli.harness import command, invoke, process
from tests.fakes.fault_backend import FaultBackend
from tests.fakes.running_gateway import request_bytes, running, settings_for, until

pytestmark = pytest.mark.usefixtures("empty_environment")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keys.yaml"
    monkeypatch.setenv("GATEWAY_KEYS_FILE", str(path))
    return path


def test_new_prints_the_key_once_and_nothing_else_on_standard_output(file: Path) -> None:
    made = invoke("keys", "new", "web")
    assert made.exit_code == 0
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}\n", made.stdout)
    assert "cannot be shown again" in made.stderr
    key = made.stdout.strip()
    assert key not in file.read_text()
    assert key not in invoke("keys", "list").output + invoke("keys", "list", "--json").output
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_every_option_becomes_a_field(file: Path) -> None:
    words = (
        "keys new web --tiers standard,pro --requests-per-minute 600 --tokens-per-minute 200000 "
        "--tokens-per-day 5000000 --concurrency 8 --priority batch --expires 2999-01-01 --downgrade standard --trusted "
        "--person-requests-per-minute 5 --person-tokens-per-day 1000 --json"
    )
    made = invoke(*words.split())
    assert json.loads(made.stdout)["name"] == "web"
    (row,) = json.loads(invoke("keys", "list", "--json").stdout)["keys"]
    assert row == {
        "name": "web", "tiers": ["standard", "pro"], "priority": "batch", "expires": "2999-01-01T00:00:00+00:00",
        "expired": False, "on_limit": {"downgrade": "standard"}, "trusted": True,
        "limits": {
            "requests_per_minute": 600, "tokens_per_minute": 200000, "tokens_per_day": 5000000, "concurrency": 8,
        },
        "per_person": {"requests_per_minute": 5, "tokens_per_day": 1000},
    }  # fmt: skip


def test_list_shows_a_line_for_each_key(file: Path) -> None:
    assert invoke("keys", "list").stdout == "no keys\n"
    invoke("keys", "new", "web", "--requests-per-minute", "600", "--tiers", "pro")
    invoke("keys", "new", "ops")
    lines = invoke("keys", "list").stdout.splitlines()
    assert lines[0].split()[:3] == ["name", "tiers", "requests/min"]
    assert lines[1].split() == ["web", "pro", "600", "-", "-", "-", "interactive", "-"]
    assert lines[2].split() == ["ops", "all", "-", "-", "-", "-", "interactive", "-"]


def test_revoke_and_rotate(file: Path) -> None:
    for name in ("web", "ops"):
        invoke("keys", "new", name)
    before = {policy.name: policy.digest for policy in read_policies(file)}
    rotated = invoke("keys", "rotate", "web")
    assert rotated.stdout.startswith("sk-")
    assert invoke("keys", "revoke", "ops").stdout == "revoked ops\n"
    (left,) = read_policies(file)
    assert (left.name, left.digest == before["web"]) == ("web", False)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("new web", "web: there is a key of this name; rotate or revoke it"),
        ("new a,b", "NAME: expected a name of at most 128 letters, digits and . _ : / @ + -"),
        ("new b --expires 2020-01-01", "--expires: got '2020-01-01'; expected a date that is not over"),
        ("new b --expires soon", "--expires: got 'soon'; expected a date such as 2027-01-01"),
        ("new b --person-tokens-per-day 5", "keys[1] (b).per_person: expected `trusted: true` as well"),
        ("revoke nobody", "nobody: there is no key of this name; the names are: web"),
        ("rotate nobody", "nobody: there is no key of this name; the names are: web"),
    ],
)
def test_mistake_is_one_line_and_status_2_and_changes_nothing(file: Path, words: str, line: str) -> None:
    invoke("keys", "new", "web")
    before = file.read_text()
    done = invoke("keys", *words.split())
    assert done.exit_code == 2
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert file.read_text() == before


def test_file_is_named_by_the_settings_as_well_and_something_has_to_name_it(tmp_path: Path) -> None:
    done = invoke("keys", "new", "web")
    assert (done.exit_code, done.stderr.startswith("GATEWAY_KEYS_FILE: not set; expected the file")) == (2, True)
    (tmp_path / "gateway.yaml").write_text("keys_file: of-the-settings.yaml\n")
    assert invoke("keys", "new", "web", "--config", "gateway.yaml").exit_code == 0
    assert (tmp_path / "of-the-settings.yaml").exists()
    (tmp_path / ".env").write_text("GATEWAY_KEYS_FILE=of-dotenv.yaml\n")
    assert invoke("keys", "new", "web").exit_code == 0
    assert (tmp_path / "of-dotenv.yaml").exists()


def test_folder_that_cannot_be_written_is_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_KEYS_FILE", str(tmp_path / "missing" / "keys.yaml"))
    done = invoke("keys", "new", "web")
    assert (done.exit_code, done.stderr.startswith("the file of keys cannot be written")) == (1, True)


def test_wrong_file_stops_serve_and_config_check_with_a_line_for_each_mistake(file: Path) -> None:
    file.write_text("keys: [{name: a}, {name: b, sha256: x}]\n")
    checked = invoke("config", "check")
    started = process("serve")
    _, errors = started.communicate(timeout=30)
    assert (checked.exit_code, started.returncode) == (2, 2)
    assert checked.stderr == errors
    assert [line.rpartition(f"{str(file)!r}: ")[2] for line in errors.splitlines()] == [
        "keys[0] (a).sha256: missing",
        "keys[1] (b).sha256: expected the 64 hex digits of a key's SHA-256, in quotes",
    ]
    invoke("keys", "revoke", "a")
    file.unlink()
    invoke("keys", "new", "a")
    assert f"keys with names: 1, in {file}" in invoke("config", "check").stdout


@pytest.mark.uvloop
async def test_running_gateway_follows_the_commands(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also while a request is on the way: a revoked key finishes what it has begun."""
    for name, seconds in (("STABLE_SECONDS", 0.05), ("LOOK_SECONDS", 0.1), ("STEP_SECONDS", 0.02)):
        monkeypatch.setattr(reload, name, seconds)
    key = (await command("keys", "new", "web")).stdout.strip()
    async with FaultBackend("vllm") as backend:
        settings = settings_for(backend).model_copy(update={"keys_file": file})
        async with running(settings) as gateway, _watching_keys(gateway.gateway.named_keys):

            async def status(key: str) -> int:
                async with gateway.sent({}, f"Authorization: Bearer {key}") as raw:
                    return (await raw.reply()).status

            async def becomes(key: str, wanted: int) -> None:
                async with asyncio.timeout(10):
                    while await status(key) != wanted:
                        await asyncio.sleep(0.02)

            assert [await status(key), await status("sk-other")] == [200, 401]
            other = (await command("keys", "new", "ops")).stdout.strip()
            await becomes(other, 200)
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            backend.mode = "slow"
            writer.write(request_bytes({"stream": True}, f"Authorization: Bearer {key}"))
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            rotated = (await command("keys", "rotate", "web")).stdout.strip()
            backend.mode = "healthy"
            await becomes(rotated, 200)
            assert await status(key) == 401
            before = await reader.read(200)
            assert before
            assert await reader.read(200)  # the old one's stream goes on
            writer.close()
            await command("keys", "revoke", "ops")
            await becomes(other, 401)
            file.write_text("")
            await until(lambda: "missing, empty or unreadable; nothing changes" in caplog.text)
            assert await status(rotated) == 200
            await until(gateway.is_idle)
