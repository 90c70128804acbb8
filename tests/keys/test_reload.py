"""Reload of the file of keys: what is wrong changes nothing and is reported."""

import logging
from pathlib import Path

import pytest

from gateway.keys.file import KeysFile, read_policies
from gateway.keys.reload import KeysReloader
from tests.keys.fakes import Clocks, accounts


@pytest.mark.parametrize("content", [None, "", "# later\n", "keys: [", "keys: [{name: a}]", "keys: {}"])
async def test_file_that_cannot_be_used_leaves_the_keys_before_in_force(
    content: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = KeysFile(tmp_path / "keys.yaml")
    file.add({"name": "a"})
    found = accounts(Clocks(), read_policies(file.path))
    reloader = KeysReloader(found, lambda name: name)
    file.path.unlink()
    if content is not None:
        file.path.write_text(content)
    outcome = await reloader.run(lambda: read_policies(file.path), "file")
    assert (outcome["ok"], outcome["keys"], len(outcome["reasons"]) >= 1) == (False, 1, True)
    assert reloader.last == outcome
    assert [key.name for key in found] == ["a"]
    assert "refused; the keys before stay in force" in caplog.text


async def test_outcome_names_what_has_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = KeysFile(tmp_path / "keys.yaml")
    for name in ("a", "b"):
        file.add({"name": name})
    found = accounts(Clocks(), read_policies(file.path))
    reloader = KeysReloader(found, lambda name: name)
    file.remove("a")
    file.replace_key("b")
    file.add({"name": "c"})
    with caplog.at_level(logging.INFO):
        outcome = await reloader.run(lambda: read_policies(file.path), "file")
    assert (outcome["ok"], outcome["added"], outcome["removed"], outcome["changed"]) == (True, ["c"], ["a"], ["b"])
    assert "keys reread (file): added c; removed a; changed b" in caplog.text
