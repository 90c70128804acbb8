"""Kind `vllm`: OpenAI's API and vLLM's own fields (vllm/entrypoints/openai/chat_completion/protocol.py, 0.32)."""

import msgspec

from gateway.chat.json_schema import Schema
from gateway.chat.request import Chat
from gateway.engines.engine import ModelFacts
from gateway.engines.openai import OpenAi, OpenAiRequest

NO_PARAMETERS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
"""Without a schema a forced call's arguments were `true`, or `0` (seen on 0.32)."""

LEAST_TOP_P = 1e-6
"""vLLM refuses 0, which OpenAI and Ollama take: the likeliest token alone."""


class Vllm(OpenAi):
    health_path = "/health"  # 503 when the engine behind the server has died

    def request(self, chat: Chat, model: str, facts: ModelFacts, stream: bool) -> OpenAiRequest:
        request = super().request(chat, model, facts, stream)
        request.top_k, request.min_p, request.repetition_penalty = chat.top_k, chat.min_p, chat.repetition_penalty
        if chat.top_p == 0:
            request.top_p = LEAST_TOP_P
        return request

    def _offer_tools(self, chat: Chat, request: OpenAiRequest) -> None:
        """Without `strict` a forced call's arguments may be any JSON: a list, a number (seen on 0.32)."""
        super()._offer_tools(chat, request)
        if chat.forced:
            for tool in request.tools:
                tool.function = msgspec.structs.replace(
                    tool.function, strict=True, parameters=tool.function.parameters or NO_PARAMETERS
                )

    def _set_effort(self, chat: Chat, request: OpenAiRequest) -> None:
        """Whether to think is an option of the model's template; before 0.16 vLLM knows no effort `none`."""
        effort = chat.effort
        request.chat_template_kwargs = {"enable_thinking": effort != "none"}
        request.reasoning_effort = effort if isinstance(effort, str) and effort != "none" else None
