"""Patience with a Redis on a busy machine, for tests that do not make it hang."""

import pytest

from gateway.replicas import link
from tests.fakes.running_gateway import PATIENCE


@pytest.fixture
def patient_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each link wait for Redis: a busy machine must not look like a Redis that hangs."""
    monkeypatch.setattr(link, "CALL_SECONDS", PATIENCE)
