"""The benchmark of sick servers, in small runs."""

import pytest

from benchmarks import sick_servers


def test_server_that_fails_every_request_loses_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert sick_servers.main(["--requests", "60", "--fault", "500"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[2:]] == ["PASS"] * 3
