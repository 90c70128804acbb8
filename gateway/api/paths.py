"""Paths of the data endpoints.

The first path of each endpoint is the documented one. The second serves clients whose base URL
lacks `/v1`.
"""

CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")
EMBEDDING_PATHS = ("/v1/embeddings", "/embeddings")

CHAT_PATH = CHAT_PATHS[0]
EMBEDDING_PATH = EMBEDDING_PATHS[0]
