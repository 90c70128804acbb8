"""Kind `vllm`: OpenAI's API plus vLLM's own fields.

See vllm/entrypoints/openai/chat_completion/protocol.py, 0.32.
"""

import msgspec

from gateway.chat.constraints import ChoiceFormat, GrammarFormat, RegexFormat
from gateway.chat.json_schema import Schema
from gateway.chat.request import Chat
from gateway.engines.engine import ModelFacts
from gateway.engines.grammar.regex import check_expansion
from gateway.engines.openai import OpenAi, OpenAiRequest, check_schemas

NO_PARAMETERS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
"""Schema of a function without parameters.

Without a schema, the arguments of a forced call were `true` or `0` (seen on 0.32).
"""

MIN_TOP_P = 1e-6
"""Smallest `top_p` that vLLM accepts: the likeliest token alone.

vLLM rejects 0, unlike OpenAI and Ollama.
"""


class Vllm(OpenAi):
    names_stop = True
    metrics_path = "/metrics"
    health_path = "/health"  # 503 when the engine behind the server has died

    def request(self, chat: Chat, model: str, facts: ModelFacts, stream: bool) -> OpenAiRequest:
        request = OpenAi.request(self, chat, model, facts, stream)  # a third of the cost of `super`
        request.top_k, request.min_p, request.repetition_penalty = chat.top_k, chat.min_p, chat.repetition_penalty
        if chat.top_p == 0:
            request.top_p = MIN_TOP_P
        if chat.is_plain:
            return request
        if chat.chat_template_kwargs is not None and (words := chat.template_words):
            request.chat_template_kwargs = words | (request.chat_template_kwargs or {})
        if chat.continue_final_message:
            request.continue_final_message, request.add_generation_prompt = True, False
        if chat.min_tokens:
            limit = request.max_tokens
            request.min_tokens = chat.min_tokens if limit is None else min(chat.min_tokens, limit)
        if chat.ignore_eos:
            request.ignore_eos = True
        if chat.stop_token_ids:
            request.stop_token_ids = chat.stop_token_ids
        if chat.mm_processor_kwargs and chat.has_images:
            request.mm_processor_kwargs = chat.mm_processor_kwargs
        return request

    def check(self, chat: Chat) -> None:
        if isinstance(wanted := chat.output_format, RegexFormat):
            check_expansion(wanted.pattern, wanted.param)
        check_schemas(chat)

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

    def _set_format(self, chat: Chat, request: OpenAiRequest) -> None:
        super()._set_format(chat, request)
        wanted = chat.output_format
        if isinstance(wanted, ChoiceFormat):
            request.structured_outputs = {"choice": wanted.choices}
        elif isinstance(wanted, RegexFormat):
            request.structured_outputs = {"regex": wanted.pattern}
        elif isinstance(wanted, GrammarFormat):
            request.structured_outputs = {"grammar": wanted.grammar}

    def _set_effort(self, chat: Chat, request: OpenAiRequest) -> None:
        """Set whether and how much to think.

        Thinking is an option of the model's template, which has one of two names: `thinking` in
        DeepSeek's and Granite's, `enable_thinking` in most others. A template ignores the other
        one. Before 0.16, vLLM does not know the effort `none`.
        """
        effort = chat.effort
        thinks = effort != "none"
        request.chat_template_kwargs = {"enable_thinking": thinks, "thinking": thinks}
        request.reasoning_effort = effort if isinstance(effort, str) and effort != "none" else None
