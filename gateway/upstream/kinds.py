"""Parts of a backend of each kind: its engine, and its requests besides chats."""

from gateway.config import BackendSettings
from gateway.engines.completions import Completer, OllamaCompleter, OpenAiCompleter
from gateway.engines.embeddings import Embedder, OllamaEmbedder, OpenAiEmbedder
from gateway.engines.engine import Engine
from gateway.engines.ollama import Ollama
from gateway.engines.ollama_loading import OllamaLoading
from gateway.engines.openai import OpenAi
from gateway.engines.vllm import Vllm


def build_parts(settings: BackendSettings) -> tuple[Engine, Embedder, Completer, OllamaLoading | None]:
    """Return what renders and reads chats, embeddings and text completions, and what loads models.

    The last is None if the servers always have their models loaded.
    """
    engine = _engine(settings)
    return engine, _embedder(settings), _completer(settings, engine), _loading(settings)


def _engine(settings: BackendSettings) -> Engine:
    if settings.kind == "ollama":
        return Ollama(settings.keep_alive, settings.num_ctx, settings.truncate)
    return Vllm() if settings.kind == "vllm" else OpenAi()


def _loading(settings: BackendSettings) -> OllamaLoading | None:
    return OllamaLoading(settings.keep_alive, settings.num_ctx) if settings.kind == "ollama" else None


def _embedder(settings: BackendSettings) -> Embedder:
    return (
        OllamaEmbedder(settings.keep_alive, settings.num_ctx, settings.truncate)
        if settings.kind == "ollama"
        else OpenAiEmbedder()
    )


def _completer(settings: BackendSettings, engine: Engine) -> Completer:
    if isinstance(engine, OpenAi):
        return OpenAiCompleter(engine)
    return OllamaCompleter(settings.keep_alive, settings.num_ctx, settings.truncate)
