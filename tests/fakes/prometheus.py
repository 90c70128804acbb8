"""A real Prometheus with the configuration and the rules of this repository, and a client of it."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import yaml

from tests.fakes.running_gateway import PATIENCE
from tests.programs import program

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
RULES = sorted((DEPLOY / "rules").glob("*.yml"))

STARTUP_PATIENCE = 25.0
"""Seconds to wait. Prometheus begins to scrape 5 s after its start."""

Samples = dict[tuple[str, ...], float]

GPU_METRICS = b"""# HELP DCGM_FI_DEV_GPU_UTIL GPU utilization (in %).
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{gpu="0"} 42
# HELP DCGM_FI_DEV_FB_USED Framebuffer memory used (in MiB).
# TYPE DCGM_FI_DEV_FB_USED gauge
DCGM_FI_DEV_FB_USED{gpu="0"} 3000
# HELP DCGM_FI_DEV_FB_FREE Framebuffer memory free (in MiB).
# TYPE DCGM_FI_DEV_FB_FREE gauge
DCGM_FI_DEV_FB_FREE{gpu="0"} 1000
# HELP DCGM_FI_DEV_GPU_TEMP GPU temperature (in C).
# TYPE DCGM_FI_DEV_GPU_TEMP gauge
DCGM_FI_DEV_GPU_TEMP{gpu="0"} 61
# HELP DCGM_FI_DEV_POWER_USAGE Power draw (in W).
# TYPE DCGM_FI_DEV_POWER_USAGE gauge
DCGM_FI_DEV_POWER_USAGE{gpu="0"} 120
"""
"""The part of the DCGM exporter's metrics that the rules and the dashboard use."""


class Prometheus:
    """Client of a running Prometheus."""

    def __init__(self, base_url: str, client: httpx2.AsyncClient) -> None:
        self.base_url = base_url
        self._client = client

    async def get(self, path: str, **params: str) -> Any:
        """Return the data of a call to the API.

        Raises:
            AssertionError: Prometheus reports an error.
        """
        answer = (await self._client.get(f"{self.base_url}/api/v1/{path}", params=params)).json()
        assert answer["status"] == "success", (params, answer)
        return answer["data"]

    async def query(self, expression: str, *labels: str) -> Samples:
        """Return the present value of each series of `expression`, by its values of `labels`.

        A series has none while the last scrape of its target failed, for example because the target was
        late by `scrape_timeout`: a test should use `until`.
        """
        result = (await self.get("query", query=expression))["result"]
        return {tuple(one["metric"].get(label, "") for label in labels): float(one["value"][1]) for one in result}

    async def until(self, expression: str, expected: Mapping[tuple[str, ...], float], *labels: str) -> None:
        """Wait until the series of `expression` have the `expected` values."""
        await self.until_holds(expression, lambda found: found == expected, *labels, what=f"{dict(expected)}")

    async def until_holds(
        self, expression: str, holds: Callable[[Samples], bool], *labels: str, what: str = "others"
    ) -> Samples:
        """Wait until `holds` is true for the series of `expression`, and return them."""
        found: Samples = {}
        try:
            async with asyncio.timeout(STARTUP_PATIENCE):
                while not holds(found := await self.query(expression, *labels)):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{expression}: {found} instead of {what}") from None
        return found


def configuration(targets: Mapping[str, str]) -> str:
    """Return the repository's configuration with other `targets` by job, as fast as a test needs it."""
    document = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    document["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "500ms"}
    document["rule_files"] = [str(path) for path in RULES]
    for job in document["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}] if job["job_name"] in targets else []
    return json.dumps(document)


@asynccontextmanager
async def prometheus(folder: Path, targets: Mapping[str, str]) -> AsyncIterator[Prometheus]:
    """Run Prometheus with its data in `folder`; it scrapes the `targets` (`host:port`) by job."""
    binary = program("prometheus")
    (folder / "prometheus.yml").write_text(configuration(targets))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        binary,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    log = asyncio.create_task(process.stderr.read())
    try:
        async with httpx2.AsyncClient(timeout=PATIENCE, trust_env=False, verify=False) as client:
            base_url = f"http://127.0.0.1:{port}"
            await _ready(client, f"{base_url}/-/ready", lambda: process.returncode is None)
            yield Prometheus(base_url, client)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await log


async def _ready(client: httpx2.AsyncClient, url: str, runs: Callable[[], bool]) -> None:
    async with asyncio.timeout(STARTUP_PATIENCE):
        while True:
            assert runs(), "Prometheus has ended"
            try:
                if (await client.get(url)).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            await asyncio.sleep(0.05)


@asynccontextmanager
async def exporter(metrics: bytes = GPU_METRICS) -> AsyncIterator[str]:
    """Serve `metrics` to a scraper; yields `host:port`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nConnection: close\r\n"
        writer.write(b"%bContent-Length: %d\r\n\r\n%b" % (head, len(metrics), metrics))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def metrics_of(expression: str) -> set[str]:
    """Return the names of metrics in a PromQL `expression`."""
    text = re.sub(r'"(?:[^"\\]|\\.)*"', "", expression)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", text)
    text = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    words = set(re.findall(r"(?<![\w:$.])[a-zA-Z_:][\w:]*(?!\s*\()(?![\w:])", text))
    return words - {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "group_left", "inf"}
