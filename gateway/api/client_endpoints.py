"""The data endpoints of all client APIs, by path."""

from functools import partial
from typing import Any

from gateway.api.admin_auth import AdminAccess
from gateway.api.chat import ChatEndpoint, ChatParts, CompletionEndpoint
from gateway.api.embeddings import EmbeddingEndpoint
from gateway.api.endpoint import Endpoint, EndpointParts
from gateway.api.operator_chat import PATH as OPERATOR_CHAT_PATH
from gateway.api.operator_chat import OperatorChatEndpoint
from gateway.api.paths import (
    CHAT_PATHS,
    COMPLETION_PATHS,
    COUNT_TOKENS_PATHS,
    EMBEDDING_PATHS,
    MESSAGE_PATHS,
    OLLAMA_CHAT_PATH,
    OLLAMA_EMBED_PATH,
    OLLAMA_EMBEDDINGS_PATH,
    OLLAMA_GENERATE_PATH,
    RERANK_PATHS,
    RESPONSE_PATHS,
)
from gateway.api.rerank import RerankEndpoint
from gateway.dialects.anthropic_messages import AnthropicCountTokens, AnthropicMessages
from gateway.dialects.ollama_chat import OllamaChat, OllamaGenerate
from gateway.dialects.ollama_embeddings import OllamaEmbed, OllamaEmbeddings
from gateway.dialects.openai_chat import OpenAiChat
from gateway.dialects.openai_completions import OpenAiCompletions
from gateway.dialects.openai_embeddings import OpenAiEmbeddings
from gateway.dialects.openai_responses import OpenAiResponses
from gateway.dialects.rerank import CohereRerank


def client_endpoints(parts: EndpointParts, chat_parts: ChatParts, operator: AdminAccess) -> dict[str, Endpoint[Any]]:
    """Build the data endpoints.

    `operator` decides who may choose the backend of a chat (`operator_chat.py`).
    """
    chat = partial(ChatEndpoint, parts=parts, chat_parts=chat_parts)
    embedding = partial(EmbeddingEndpoint, parts=parts)
    return {
        **dict.fromkeys(CHAT_PATHS, chat(OpenAiChat())),
        **dict.fromkeys(COMPLETION_PATHS, CompletionEndpoint(OpenAiCompletions(), parts, chat_parts)),
        **dict.fromkeys(MESSAGE_PATHS, chat(AnthropicMessages())),
        **dict.fromkeys(COUNT_TOKENS_PATHS, chat(AnthropicCountTokens())),
        **dict.fromkeys(RESPONSE_PATHS, chat(OpenAiResponses())),
        OLLAMA_CHAT_PATH: chat(OllamaChat()),
        OLLAMA_GENERATE_PATH: chat(OllamaGenerate()),
        OPERATOR_CHAT_PATH: OperatorChatEndpoint(OpenAiChat(), parts, chat_parts, operator),
        **dict.fromkeys(EMBEDDING_PATHS, embedding(OpenAiEmbeddings())),
        OLLAMA_EMBED_PATH: embedding(OllamaEmbed()),
        OLLAMA_EMBEDDINGS_PATH: embedding(OllamaEmbeddings()),
        **dict.fromkeys(RERANK_PATHS, RerankEndpoint(CohereRerank(), parts)),
    }
