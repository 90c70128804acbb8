"""The command line: exit status 0 done, 1 it ran and the answer is bad, 2 wrong words or settings."""

import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx2
import jsonschema
import pytest
import tenacity
import yaml
from typer.testing import CliRunner, Result

from gateway import __version__
from gateway.cli.commands import app
from tests.real_engines.process import free_port

ROOT = Path(__file__).parents[2]
SECRET = "a-key-that-nobody-may-see"


pytestmark = pytest.mark.usefixtures("empty_environment")


def gateway(*words: str, **variables: str) -> Result:
    return CliRunner().invoke(app, words, env=variables)


def run(*words: str, **variables: str) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "gateway", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_version_is_printed() -> None:
    result = gateway("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, __version__)


def test_operators_commands_do_not_wait_for_the_server_to_be_imported() -> None:
    code = "import sys, gateway.cli.commands; print(*({'fastapi', 'uvicorn', 'PIL', 'gateway.simulate', 'gateway.app'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "")


HEAVY = """
import os, signal
os.kill(os.getpid(), signal.{name})
os._exit(7)
"""
"""What stands in for the first thing that takes long to import."""


@pytest.mark.parametrize(("name", "status"), [("SIGHUP", 7), ("SIGTERM", 0)])
def test_signal_while_the_gateway_is_imported_does_not_kill_it(tmp_path: Path, name: str, status: int) -> None:
    """A supervisor may reload or stop what it has only just started; in a container SIGTERM would be lost."""
    (tmp_path / "typer.py").write_text(HEAVY.format(name=name))
    with run("serve", PYTHONPATH=f"{tmp_path}:{ROOT}") as process:
        assert process.wait(20) == status


def test_command_is_the_module() -> None:
    """Both see to the signals first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"gateway": "gateway.__main__:main"}


@pytest.mark.parametrize(("hard", "told"), [(4096, False), (300, True)])
def test_gateway_has_as_many_files_as_the_system_lets_and_says_when_these_are_few(
    tmp_path: Path, hard: int, told: bool
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GATEWAY_PORT": "0", "GATEWAY_STATE_FILE": ""}
    command = ["sh", "-c", f'ulimit -Sn 256; ulimit -Hn {hard}; exec "$0" -m gateway serve', sys.executable]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = ""
        while "serving http" not in log:
            log += process.stderr.readline()
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        process.terminate()
        process.stderr.read()
    assert (
        next(line for line in limits.splitlines() if line.startswith("Max open files")).split()[3:5] == [str(hard)] * 2
    )
    assert (f"the limit of open files is only {hard}" in log) is told


def test_port_that_is_taken_is_named_by_its_own_variable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for variable, others in (("GATEWAY_PORT", {}), ("GATEWAY_METRICS_PORT", {"GATEWAY_PORT": "0"})):
            with run("serve", **{variable: port, **others}) as process:
                _, told = process.communicate(timeout=20)
            assert process.returncode == 2
            assert told.splitlines()[-1].startswith(f"{variable}: cannot listen on 127.0.0.1:{port}: ")


def test_help_names_the_commands() -> None:
    result = gateway("--help")
    assert result.exit_code == 0
    for command in ("serve", "demo", "status", "switch", "verify", "rollback", "undo", "config", "simulate"):
        assert command in result.stdout


@pytest.mark.parametrize(
    "words",
    [("nonsense",), ("serve", "--nonsense"), ("config", "nonsense"), ("simulate", "--kind", "gpt"), ("simulate",)],
)
def test_wrong_words_are_2(words: tuple[str, ...]) -> None:
    assert gateway(*words).exit_code == 2


# Settings


@pytest.mark.parametrize("words", [("serve",), ("demo",), ("config", "check"), ("config", "show")])
def test_wrong_settings_are_2_with_one_line_each_on_standard_error(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.cli.demo.OLLAMA_URLS", ())
    monkeypatch.setattr("gateway.cli.demo.VLLM_URLS", ())
    result = gateway(*words, GATEWAY_PORT="much", LLM_BACKEND="nowhere")
    assert (result.exit_code, result.stdout) == (2, "")
    port, backend = result.stderr.splitlines()
    assert "GATEWAY_PORT" in port
    assert "much" in port
    assert "LLM_BACKEND" in backend or "llm_backend" in backend
    assert "expected" in port
    assert "expected" in backend


def test_file_that_is_not_there_is_2() -> None:
    result = gateway("config", "check", "--config", "nowhere.yaml")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "nowhere.yaml" in result.stderr


def test_good_settings_are_told_and_0() -> None:
    result = gateway("config", "check")
    assert result.exit_code == 0
    assert "standard" in result.stdout


def test_settings_are_shown_without_secrets_as_a_file_that_can_be_used() -> None:
    Path("mine.yaml").write_text(f"admin_key: {SECRET}\nheartbeat: 7s\n")
    result = gateway("config", "show", "--config", "mine.yaml", GATEWAY_API_KEYS=f"{SECRET}-2")
    assert result.exit_code == 0
    assert SECRET not in result.stdout
    assert yaml.safe_load(result.stdout)["heartbeat"] in (7, "7s")


def test_schema_takes_the_example() -> None:
    result = gateway("config", "schema")
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load((ROOT / "gateway.example.yaml").read_text()), schema)


# Processes


def test_serve_serves_on_both_ports_until_sigterm_and_ends_with_0() -> None:
    metrics_port = free_port()
    variables = {
        "GATEWAY_ADMIN_KEY": SECRET,
        "GATEWAY_METRICS_PORT": str(metrics_port),
        "OLLAMA_BASE_URL": "http://127.0.0.1:1",
    }
    with run("serve", GATEWAY_PORT="0", GATEWAY__LOG_FORMAT="json", **variables) as process:
        assert process.stderr is not None
        try:
            events: list[dict[str, str]] = []
            while not events or not events[-1]["event"].startswith("serving "):
                events.append(json.loads(process.stderr.readline()))
            url = events[-1]["event"].split()[1].rstrip(";")
            assert status_of(f"{url}/healthz") == 200
            assert status_of(f"{url}/metrics") == 401
            beside = f"http://127.0.0.1:{metrics_port}"
            assert [status_of(f"{beside}{path}") for path in ("/healthz", "/metrics", "/ops/status", "/v1/models")] == [
                200,
                200,
                404,
                404,
            ]
            assert any("GATEWAY_API_KEYS: there are none" in event["event"] for event in events)
            assert SECRET not in str(events)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def status_of(url: str) -> int:
    """Tried again while nothing listens there: a port opens a moment after the other."""
    for attempt in tenacity.Retrying(stop=tenacity.stop_after_delay(10), wait=tenacity.wait_fixed(0.05), reraise=True):
        with attempt:
            return httpx2.get(url, trust_env=False, timeout=20).status_code
    raise AssertionError


def test_port_that_is_taken_is_2_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with run("serve", GATEWAY_PORT=port) as process:
            _, told = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith(f"GATEWAY_PORT: cannot listen on 127.0.0.1:{port}")


def test_stand_in_tells_its_address_and_serves() -> None:
    with run("simulate", "--kind", "ollama", "--model", "llama,tools,context=1000") as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            listed = httpx2.get(f"{url}/api/tags", trust_env=False, timeout=20).json()
            assert [model["name"] for model in listed["models"]] == ["llama:latest"]
        finally:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


def test_any_option_of_a_stand_in_can_be_set() -> None:
    with run(
        "simulate", "--kind", "ollama", "--model", "llama", "--set", "gpu=yes", "--set", "time_scale=0.5"
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().startswith("http://127.0.0.1:")
        finally:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    result = gateway("simulate", "--kind", "ollama", "--set", "gpu=maybe")
    assert (result.exit_code, result.stderr) == (2, "--set: 'gpu=maybe': gpu is yes or no\n")


def test_model_that_says_nonsense_is_2() -> None:
    result = gateway("simulate", "--kind", "vllm", "--model", "m,wings")
    assert result.exit_code == 2
    assert result.stderr.startswith("--model: 'wings'")
