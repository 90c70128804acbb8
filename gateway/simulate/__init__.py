"""Stand-ins for Ollama and vLLM with configurable speed, parallelism and faults.

Imports no other package of the gateway.
"""

from gateway.simulate.gpu import OutOfGpuMemory, read_gpu
from gateway.simulate.ollama.app import OllamaApp
from gateway.simulate.options import SEED_SLOWDOWN, Fault, Kind, Model, OllamaGeneration, Options
from gateway.simulate.server import Running, application, running, serve
from gateway.simulate.text import digest
from gateway.simulate.vllm.app import VllmApp

__all__ = [
    "SEED_SLOWDOWN",
    "Fault",
    "Kind",
    "Model",
    "OllamaApp",
    "OllamaGeneration",
    "Options",
    "OutOfGpuMemory",
    "Running",
    "VllmApp",
    "application",
    "digest",
    "read_gpu",
    "running",
    "serve",
]
