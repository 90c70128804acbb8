"""Memory and use of this machine's GPUs by NVML, where nvidia-ml-py is installed and a driver is there."""

import importlib
from typing import Any, Protocol


class Gpus(Protocol):
    """A source of readings."""

    def memory_percent(self) -> float | None:
        """Return the share of the GPUs' memory that is in use, by all programs; None: cannot be read."""
        ...

    def use_percent(self) -> float | None:
        """Return the share of time in which the GPUs worked, as their mean; None: cannot be read."""
        ...

    def names(self) -> list[str]: ...


class NvmlGpus:
    """The GPUs that NVML sees. Values are in percent over all of them."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._devices = [nvml.nvmlDeviceGetHandleByIndex(place) for place in range(nvml.nvmlDeviceGetCount())]

    def memory_percent(self) -> float | None:
        """Return the share of the GPUs' memory in use; see `Gpus`."""
        try:
            found = [self._nvml.nvmlDeviceGetMemoryInfo(device) for device in self._devices]
        except self._nvml.NVMLError:
            return None  # GPUs that share the machine's memory, such as GB10, do not report it
        total = sum(one.total for one in found)
        return 100 * sum(one.used for one in found) / total if total else None

    def use_percent(self) -> float | None:
        """Return the mean use of the GPUs; see `Gpus`."""
        try:
            found = [self._nvml.nvmlDeviceGetUtilizationRates(device).gpu for device in self._devices]
        except self._nvml.NVMLError:
            return None
        return sum(found) / len(found) if found else None

    def names(self) -> list[str]:
        """Return the names of the GPUs."""
        try:
            names = [self._nvml.nvmlDeviceGetName(device) for device in self._devices]
        except self._nvml.NVMLError:
            return []
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def find_gpus() -> Gpus | None:
    """Return this machine's GPUs; None without nvidia-ml-py, a driver, or a GPU."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        gpus = NvmlGpus(nvml)
    except nvml.NVMLError:
        return None
    return gpus if gpus.names() else None
