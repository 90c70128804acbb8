"""The HTTP client that the commands use to call `/ops` of a running gateway."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx2
from dotenv import dotenv_values

from gateway import config

SECONDS = 10.0

PREFLIGHT_SECONDS, PREFLIGHT_MARGIN = 30.0, 15.0
"""What a check may take, and how much longer its answer is waited for: it may be another one's turn."""


class OpsError(Exception):
    """The gateway was not reached, or it refused; the text says what to do next."""


class OpsClient:
    """One gateway: its base URL and the admin key, where there is one."""

    def __init__(self, base_url: str, key: str | None) -> None:
        self.base_url = base_url
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    @classmethod
    def of_settings(cls, file: Path | None) -> "OpsClient":
        """The gateway at GATEWAY_URL, else the one that `serve` would start with the same settings.

        Raises:
            ConfigError: the settings are wrong, or GATEWAY_URL is.
            Failed: nothing says where it is.
        """
        variables = {**dotenv_values(".env"), **os.environ}
        url = (variables.get("GATEWAY_URL") or "").strip()
        if url:
            try:
                base_url = config.normalise_base_url(url)
            except ValueError as error:
                raise OpsError(f"GATEWAY_URL: {error}") from None
            return cls(
                base_url, variables.get("GATEWAY_ADMIN_KEY")
            )  # whatever else is in the settings: it is another machine's
        settings = config.load(file)
        if not settings.port:
            raise OpsError("GATEWAY_PORT is 0, so nobody knows where the gateway listens; set GATEWAY_URL")
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        key = settings.admin_key.get_secret_value() if settings.admin_key else None
        return cls(config.normalise_base_url(f"http://{host}:{settings.port}"), key)

    def preflight(self, backend: str | None, tier: str | None, seconds: float = PREFLIGHT_SECONDS) -> dict[str, Any]:
        """What a switch to `backend` would break, by the gateway's own look at it.

        Raises:
            Failed
        """
        words = {
            name: value
            for name, value in (("backend", backend), ("tier", tier), ("seconds", f"{seconds:g}"))
            if value is not None
        }
        return self.request("POST", f"/ops/preflight?{urlencode(words)}", seconds=seconds + PREFLIGHT_MARGIN)

    def request(
        self, method: str, path: str, order: Mapping[str, Any] | None = None, seconds: float = SECONDS
    ) -> dict[str, Any]:
        """The gateway's answer, within `seconds` for each step.

        Raises:
            Failed
        """
        try:
            answer = httpx2.request(
                method, f"{self.base_url}{path}", json=order, headers=self._headers, timeout=seconds, trust_env=False
            )
            body = answer.json()
        except httpx2.TimeoutException:
            raise OpsError(
                f"no answer from {self.base_url} within {seconds:g} s; is it the gateway's address? GATEWAY_URL sets another"
            ) from None
        except httpx2.HTTPError:
            raise OpsError(
                f"no gateway can be reached at {self.base_url}; is it running? GATEWAY_URL sets another address"
            ) from None
        except ValueError:
            raise OpsError(
                f"what answers at {self.base_url} is not this gateway; GATEWAY_URL sets another address"
            ) from None
        if answer.status_code == 200 and isinstance(body, dict) and "tiers" in body:
            return body
        raise OpsError(self._refusal(answer.status_code, body))

    def _refusal(self, status: int, body: object) -> str:
        error = body.get("error") if isinstance(body, dict) else None
        if status == 200 or not isinstance(error, dict):
            return f"what answers at {self.base_url} is not this gateway; GATEWAY_URL sets another address"
        if status == 401:
            return "the gateway refuses the key; set GATEWAY_ADMIN_KEY to its admin key"
        return f"{error.get('message')} ({status} {error.get('code')})"
