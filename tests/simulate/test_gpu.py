"""A simulated GPU that stand-ins share."""

from pathlib import Path

import orjson
import pytest

from gateway.simulate.gpu import OutOfGpuMemory, SharedGpu, read_gpu


def test_memory_is_held_once(tmp_path: Path) -> None:
    file = tmp_path / "gpu"
    one, other = SharedGpu(str(file), 100), SharedGpu(str(file), 100)
    one.hold(60)
    with pytest.raises(OutOfGpuMemory, match="50 bytes wanted, 40 free"):
        other.hold(50)
    one.hold(30)
    other.hold(50)
    one.hold(0)
    found = read_gpu(file)
    assert [entry[0] for entry in found["held"].values()] == [50]
    assert (found["peak"], found["most_engines"], found["refused"]) == (80, 2, 1)


def test_a_process_that_has_ended_holds_nothing(tmp_path: Path) -> None:
    file = tmp_path / "gpu"
    file.write_bytes(orjson.dumps({"held": {"dead": [90, 2**22 + 1]}, "peak": 90, "most_engines": 1, "refused": 0}))
    SharedGpu(str(file), 100).hold(80)


def test_without_a_file_there_is_no_limit() -> None:
    SharedGpu("", 1).hold(10**12)
