"""Stand-ins that speak as Ollama and vLLM do, with settable speed, parallelism and faults. Imports nothing else of the gateway."""

from gateway.simulate.ollama.app import Ollama
from gateway.simulate.options import SEED_SLOWDOWN, Fault, Generation, Kind, Model, Options
from gateway.simulate.server import Running, application, running, serve
from gateway.simulate.text import digest
from gateway.simulate.vllm.app import Vllm

__all__ = [
    "SEED_SLOWDOWN",
    "Fault",
    "Generation",
    "Kind",
    "Model",
    "Ollama",
    "Options",
    "Running",
    "Vllm",
    "application",
    "digest",
    "running",
    "serve",
]
