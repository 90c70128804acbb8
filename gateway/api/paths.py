"""Paths of the data endpoints and of the liveness check.

The first path of each data endpoint is the documented one. The second serves clients whose base URL
lacks `/v1`.
"""

CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
EMBEDDING_PATHS = ("/v1/embeddings", "/embeddings")

CHAT_PATH = CHAT_PATHS[0]
EMBEDDING_PATH = EMBEDDING_PATHS[0]

# Load balancers and programs for vLLM or SageMaker expect the second or the third one.
ALIVE_PATHS = ("/healthz", "/health", "/ping")
