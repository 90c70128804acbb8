"""Programs of the operating system that some tests run: Prometheus, Redis, Chromium, nginx."""

import os
import shutil

import pytest

SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin"))


def program(name: str) -> str:
    """Return the path of an installed program.

    Skips the test where it is not installed; fails it instead if TEST_REQUIRE_PROGRAMS is set, as in CI.
    """
    path = shutil.which(name, path=SEARCH_PATH)
    if path is not None:
        return path
    if os.environ.get("TEST_REQUIRE_PROGRAMS"):
        pytest.fail(f"{name} is not installed, and TEST_REQUIRE_PROGRAMS is set")
    pytest.skip(f"{name} is not installed")
