"""Kind `vllm`: OpenAI's API and vLLM's own sampling fields (vllm/entrypoints/openai/chat_completion/protocol.py, 0.32)."""

from gateway.backends.openai import OpenAi, Request
from gateway.protocol import Chat


class Vllm(OpenAi):
    def request(self, chat: Chat, model: str, stream: bool) -> Request:
        request = super().request(chat, model, stream)
        request.top_k, request.min_p, request.repetition_penalty = chat.top_k, chat.min_p, chat.repetition_penalty
        return request
