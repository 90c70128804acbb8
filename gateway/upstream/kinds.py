"""What a backend of each kind is made of: its engine, and its requests besides chats."""

from gateway.config import BackendSettings
from gateway.engines.completions import Completer, OllamaCompleter, OpenAiCompleter
from gateway.engines.embeddings import Embedder, OllamaEmbedder, OpenAiEmbedder
from gateway.engines.engine import Engine
from gateway.engines.ollama import Ollama
from gateway.engines.ollama_loading import OllamaLoading
from gateway.engines.openai import OpenAi
from gateway.engines.vllm import Vllm


def build_engine(settings: BackendSettings) -> Engine:
    """Return what renders chats for the servers and reads their answers."""
    if settings.kind == "ollama":
        return Ollama(settings.keep_alive, settings.num_ctx, settings.truncate)
    return Vllm() if settings.kind == "vllm" else OpenAi()


def build_loading(settings: BackendSettings) -> OllamaLoading | None:
    """Return the requests that load models, or None if the servers always have theirs loaded."""
    return OllamaLoading(settings.keep_alive, settings.num_ctx) if settings.kind == "ollama" else None


def build_embedder(settings: BackendSettings) -> Embedder:
    """Return what does the same for embeddings as the engine for chats."""
    return (
        OllamaEmbedder(settings.keep_alive, settings.num_ctx, settings.truncate)
        if settings.kind == "ollama"
        else OpenAiEmbedder()
    )


def build_completer(settings: BackendSettings, engine: Engine) -> Completer:
    """Return what does the same for text completions as the engine for chats."""
    if isinstance(engine, OpenAi):
        return OpenAiCompleter(engine)
    return OllamaCompleter(settings.keep_alive, settings.num_ctx, settings.truncate)
