"""Paths of the data endpoints and of the health checks.

The first path of each data endpoint is the documented one. The second serves clients whose base URL
lacks `/v1`.
"""

import re

CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
COMPLETION_PATHS = ("/v1/completions", "/completions")
EMBEDDING_PATHS = ("/v1/embeddings", "/embeddings")
RERANK_PATHS = ("/v1/rerank", "/rerank", "/v2/rerank")
MESSAGE_PATHS = ("/v1/messages", "/messages")
COUNT_TOKENS_PATHS = ("/v1/messages/count_tokens", "/messages/count_tokens")
RESPONSE_PATHS = ("/v1/responses", "/responses")
OLLAMA_CHAT_PATH = "/api/chat"
OLLAMA_GENERATE_PATH = "/api/generate"
OLLAMA_EMBED_PATH = "/api/embed"
OLLAMA_EMBEDDINGS_PATH = "/api/embeddings"

CHAT_PATH = CHAT_PATHS[0]
EMBEDDING_PATH = EMBEDDING_PATHS[0]

# Load balancers and programs for vLLM or SageMaker expect the second or the third one.
ALIVE_PATHS = ("/healthz", "/health", "/ping")
READY_PATH = "/readyz"

_WITHOUT_HOST_CHECK = (*ALIVE_PATHS, READY_PATH, "/metrics")


def checks_host(path: str) -> bool:
    """Return whether requests to `path` are subject to the check of `Host`.

    Health checks are not: they name whatever address they have. Nor are `/ops` and `/metrics`,
    whose own authorisation covers it.
    """
    return path not in _WITHOUT_HOST_CHECK and not path.startswith("/ops/")


_repeated_slashes = re.compile("/{2,}")


def plain_path(path: str) -> str:
    """Return `path` without repeated and trailing slashes.

    Programs write them when they join a base URL that ends with a slash, and a path.
    """
    return (_repeated_slashes.sub("/", path).rstrip("/") or "/") if "//" in path or path.endswith("/") else path
