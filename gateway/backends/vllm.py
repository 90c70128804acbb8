"""Kind `vllm`: OpenAI's API and vLLM's own sampling fields (vllm/entrypoints/openai/chat_completion/protocol.py, 0.32)."""

from gateway.backends.openai import OpenAi
from gateway.protocol import Chat


class Vllm(OpenAi):
    def sampling(self, chat: Chat) -> dict[str, object]:
        return {**super().sampling(chat), "top_k": chat.top_k, "min_p": chat.min_p, "repetition_penalty": chat.repetition_penalty}
