import sys
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.bench.gpu import NvmlGpus, find_gpus


class NVMLError(Exception):
    pass


def nvml(*, count: int = 2, broken: str = "") -> Any:
    """Return a stand-in for the module `pynvml`."""

    def reads(name: str, value: Any) -> Any:
        def read(*_: object) -> Any:
            if name == broken:
                raise NVMLError("not supported")
            return value

        return read

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=reads("init", None),
        nvmlDeviceGetCount=reads("count", count),
        nvmlDeviceGetHandleByIndex=lambda place: place,
        nvmlDeviceGetMemoryInfo=lambda device: reads("memory", SimpleNamespace(used=(device + 1) * 10, total=100))(),
        nvmlDeviceGetUtilizationRates=lambda device: reads("use", SimpleNamespace(gpu=40 + 20 * device))(),
        nvmlDeviceGetName=reads("name", b"NVIDIA GB10"),
    )


def test_memory_and_use_are_those_of_all_gpus() -> None:
    gpus = NvmlGpus(nvml())
    assert gpus.memory_percent() == 15
    assert gpus.use_percent() == 50
    assert gpus.names() == ["NVIDIA GB10", "NVIDIA GB10"]


def test_a_gpu_that_does_not_report_its_memory_is_not_seen_there() -> None:
    gpus = NvmlGpus(nvml(broken="memory"))
    assert gpus.memory_percent() is None
    assert gpus.use_percent() == 50
    assert NvmlGpus(nvml(broken="use")).use_percent() is None


def test_gpus_are_found_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    found = find_gpus()
    assert found is not None
    assert found.memory_percent() == 15


@pytest.mark.parametrize("module", [None, nvml(broken="init"), nvml(broken="count"), nvml(count=0)])
def test_without_a_module_a_driver_or_a_gpu_there_is_none(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert find_gpus() is None
