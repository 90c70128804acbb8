"""HTTP client with which the commands call `/ops` of a running gateway."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx2
from dotenv import dotenv_values

from gateway import config
from gateway.admin_token import read_token, token_path
from gateway.api.hosts import is_local_host

SECONDS = 10.0
"""Timeout for each step of a call."""

PREFLIGHT_SECONDS, PREFLIGHT_MARGIN = 30.0, 15.0
"""Duration of a preflight check, and additional time to wait for its result.

The margin covers the wait for another check, because one runs at a time.
"""


_PORTS = {"http": 80, "https": 443}


class OpsError(Exception):
    """The gateway could not be reached, or it refused; the text says what to do next.

    `status` is that of its answer, None without an answer.
    """

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class OpsClient:
    """Client of one gateway, by its base URL and its admin key or token, if it has one.

    `hint` completes the report of a refused key.
    """

    def __init__(self, base_url: str, key: str | None, hint: str = "") -> None:
        self.base_url = base_url
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._hint = hint

    @classmethod
    def of_settings(cls, file: Path | None) -> "OpsClient":
        """Return a client of the gateway at GATEWAY_URL, else of the one that `serve` would start.

        With GATEWAY_URL the settings only tell where the token of a gateway on this machine is:
        they may be those of another machine, or invalid. A token is never sent to another machine.

        Raises:
            ConfigError: the settings are invalid.
            OpsError: GATEWAY_URL is invalid, or the settings do not say where the gateway listens.
        """
        variables = _variables()
        url = (variables.get("GATEWAY_URL") or "").strip()
        if url:
            return cls.of_url(url, file, "GATEWAY_URL")
        settings = config.load(file)
        if not settings.port:
            raise OpsError("GATEWAY_PORT is 0, so the gateway's port is unknown; set GATEWAY_URL")
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        base_url = config.normalise_base_url(f"http://{host}:{settings.port}")
        if settings.admin_key:
            return cls(base_url, settings.admin_key.get_secret_value())
        return cls._with_token(base_url, settings.state_file, settings.port)

    @classmethod
    def of_url(cls, url: str, file: Path | None, name: str) -> "OpsClient":
        """Return a client of the gateway at `url`, which was given as `name`.

        Raises:
            OpsError: `url` is invalid.
        """
        try:
            base_url = config.normalise_base_url(url)
        except ValueError as error:
            raise OpsError(f"{name}: {error}") from None
        variables = _variables()
        key = (variables.get("GATEWAY_ADMIN_KEY") or "").strip()
        parts = urlsplit(base_url)
        if key or not is_local_host(parts.netloc):
            return cls(base_url, key)
        return cls._with_token(base_url, _state_file(file, variables), parts.port or _PORTS[parts.scheme])

    @classmethod
    def _with_token(cls, base_url: str, state_file: Path | None, port: int) -> "OpsClient":
        path = token_path(state_file, port)
        try:
            token, found = read_token(path), f"the admin token in {path} is not this gateway's"
        except OSError as error:
            token, found = None, f"its admin token cannot be read from {path} ({error.strerror})"
        return cls(base_url, token, f", or run the command with the gateway's user and settings: {found}")

    def preflight(self, backend: str | None, tier: str | None, seconds: float = PREFLIGHT_SECONDS) -> dict[str, Any]:
        """Return the gateway's report on what a switch to `backend` would break.

        Raises:
            OpsError: the gateway could not be reached, or it refused.
        """
        query = {
            name: value
            for name, value in (("backend", backend), ("tier", tier), ("seconds", f"{seconds:g}"))
            if value is not None
        }
        return self.request("POST", f"/ops/preflight?{urlencode(query)}", seconds=seconds + PREFLIGHT_MARGIN)

    def metrics(self) -> str:
        """Return the gateway's metrics as Prometheus text.

        Raises:
            OpsError: the gateway could not be reached, or it refused.
        """
        url = f"{self.base_url}/metrics"
        try:
            response = httpx2.get(url, headers=self._headers, timeout=SECONDS, trust_env=False)
        except httpx2.HTTPError as error:
            raise OpsError(self._no_answer(error)) from None
        if response.status_code != 200 or not response.headers.get("content-type", "").startswith("text/plain"):
            try:
                answer = response.json()
            except ValueError:
                raise OpsError(self._not_a_gateway(), response.status_code) from None
            raise OpsError(self._refusal(response.status_code, answer), response.status_code)
        return response.text

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float = SECONDS,
        field: str = "tiers",
    ) -> dict[str, Any]:
        """Return the gateway's answer, waiting at most `seconds` for each step.

        `field` is one that the answer has if the server is a gateway.

        Raises:
            OpsError: the gateway could not be reached, or it refused.
        """
        try:
            response = httpx2.request(
                method, f"{self.base_url}{path}", json=body, headers=self._headers, timeout=seconds, trust_env=False
            )
            answer = response.json()
        except httpx2.TimeoutException:
            raise OpsError(
                f"no answer from {self.base_url} within {seconds:g} s; "
                "if the gateway has another address, set GATEWAY_URL"
            ) from None
        except httpx2.HTTPError as error:
            raise OpsError(self._no_answer(error)) from None
        except ValueError:
            raise OpsError(self._not_a_gateway()) from None
        if response.status_code == 200 and isinstance(answer, dict) and field in answer:
            return answer
        raise OpsError(self._refusal(response.status_code, answer), response.status_code)

    def _no_answer(self, error: httpx2.HTTPError) -> str:
        if isinstance(error, httpx2.ConnectError):
            return f"cannot reach a gateway at {self.base_url}; start it, or set GATEWAY_URL to its address"
        return f"the server at {self.base_url} did not answer ({type(error).__name__}); see the gateway's log"

    def _not_a_gateway(self) -> str:
        return f"the server at {self.base_url} is not an LLM gateway; set GATEWAY_URL to the gateway's address"

    def _refusal(self, status: int, answer: object) -> str:
        error = answer.get("error") if isinstance(answer, dict) else None
        if status == 200 or not isinstance(error, dict):
            return self._not_a_gateway()
        if status == 401:
            return f"the gateway refuses the key; set GATEWAY_ADMIN_KEY to its admin key{self._hint}"
        return f"{error.get('message')} ({status} {error.get('code')})"


def _variables() -> dict[str, str | None]:
    return {**dotenv_values(".env"), **os.environ}


def _state_file(file: Path | None, variables: Mapping[str, str | None]) -> Path | None:
    """Return the state file that the settings name, or the variables if the settings are invalid."""
    try:
        return config.load(file).state_file
    except config.ConfigError:
        name = (variables.get("GATEWAY_STATE_FILE") or "").strip()
        return Path(name) if name else None
