"""Kind `vllm`: OpenAI's API plus vLLM's own fields.

See vllm/entrypoints/openai/chat_completion/protocol.py, 0.32.
"""

import msgspec

from gateway.chat.json_schema import Schema
from gateway.chat.request import Chat
from gateway.engines.engine import ModelFacts
from gateway.engines.openai import OpenAi, OpenAiRequest

NO_PARAMETERS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
"""Schema of a function without parameters.

Without a schema, the arguments of a forced call were `true` or `0` (seen on 0.32).
"""

MIN_TOP_P = 1e-6
"""Smallest `top_p` that vLLM accepts: the likeliest token alone.

vLLM rejects 0, unlike OpenAI and Ollama.
"""


class Vllm(OpenAi):
    health_path = "/health"  # 503 when the engine behind the server has died

    def request(self, chat: Chat, model: str, facts: ModelFacts, stream: bool) -> OpenAiRequest:
        request = super().request(chat, model, facts, stream)
        request.top_k, request.min_p, request.repetition_penalty = chat.top_k, chat.min_p, chat.repetition_penalty
        if chat.top_p == 0:
            request.top_p = MIN_TOP_P
        return request

    def _offer_tools(self, chat: Chat, request: OpenAiRequest) -> None:
        """Offer the tools, with `strict` for a forced call.

        Without it, the arguments may be any JSON, such as a list or a number (seen on 0.32).
        """
        super()._offer_tools(chat, request)
        forced = {function.name for function in chat.forced}
        for tool in request.tools:
            if tool.function.name in forced:
                tool.function = msgspec.structs.replace(
                    tool.function, strict=True, parameters=tool.function.parameters or NO_PARAMETERS
                )

    def _set_effort(self, chat: Chat, request: OpenAiRequest) -> None:
        """Set whether and how much to think.

        Thinking is an option of the model's template; before 0.16, vLLM does not know the effort
        `none`.
        """
        effort = chat.effort
        request.chat_template_kwargs = {"enable_thinking": effort != "none"}
        request.reasoning_effort = effort if isinstance(effort, str) and effort != "none" else None
