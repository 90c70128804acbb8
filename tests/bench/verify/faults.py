"""Table of wrong servers: for each check of `gateway verify`, ways in which a server fails it."""

from dataclasses import dataclass

from tests.bench.verify.changes import (
    a_call,
    accepts_anything,
    broken_syllables,
    broken_value,
    broken_values,
    calls,
    cut_bytes,
    error,
    errors,
    forgets,
    late_text,
    logprob,
    narrow_vector,
    no_finish,
    no_role,
    no_usage_chunk,
    on,
    one_piece,
    only_last_message,
    other_ids,
    plain,
    raw_stream,
    refuses,
    same_vectors,
    shifted_base64,
    stream_calls,
    streamed,
    swapped,
    text,
    unasked_usage,
    usage_with_choices,
    vectors,
    without,
    without_images,
)
from tests.bench.verify.wrong_server import Wrong


@dataclass(frozen=True)
class Fault:
    """A wrong server and the check that it fails.

    `reason` is the key of the reason; `kind` is what the server claims to be, if not a vLLM.
    """

    check: str
    reason: str
    wrong: Wrong
    kind: str = ""
    key: str | None = None
    server_key: str = ""
    tokens_per_second: float = 0.0
    answer_tokens: int = 32

    def __str__(self) -> str:
        return f"{self.check}-{self.reason}{'-' + self.kind if self.kind else ''}"


ACCEPTED = errors(lambda answer: answer.say(200, {"object": "chat.completion", "choices": []}))
CRASHED = errors(lambda answer: answer.say(500, error("Internal Server Error")))
IN_FASTAPIS_SHAPE = errors(lambda answer: answer.say(answer.status, {"detail": [{"msg": "Field required"}]}))
WITHOUT_JSON = errors(lambda answer: setattr(answer, "body", b"Bad Request"))
NUMBERED = errors(lambda answer: answer.say(answer.status, error("No.", code=answer.status)))
OTHER_CODE = errors(lambda answer: answer.say(answer.status, error("No.", code="something_else")))
ERROR_CHECKS = (
    "bad_json", "unknown_model", "missing_messages", "wrong_type", "wrong_request_streamed", "says_what_is_wrong",
    "bad_image", "too_long",
)  # fmt: skip


def _error_faults() -> list[Fault]:
    faults = []
    for check in ERROR_CHECKS:
        accepted = "prompt_cut" if check == "too_long" else "accepted"
        faults += [
            Fault(check, accepted, ACCEPTED),
            Fault(check, "wrong_status", CRASHED),
            Fault(check, "wrong_error_shape", IN_FASTAPIS_SHAPE),
            Fault(check, "wrong_error_shape", WITHOUT_JSON),
            Fault(check, "wrong_error_shape", NUMBERED, kind="gateway"),
            Fault(check, "wrong_code", OTHER_CODE, kind="gateway"),
        ]
    return faults


FAULTS: list[Fault] = [
    # server
    Fault("lists_models", "no_model_list", on("/v1/models", lambda answer: answer.say(500, {}))),
    Fault("lists_models", "no_model_list", on("/v1/models", lambda answer: answer.say(200, {"models": []}))),
    Fault("lists_models", "no_models", on("/v1/models", lambda answer: answer.say(200, {"data": []}))),
    Fault("lists_models", "key_refused", Wrong(), server_key="sk-right", key="sk-wrong"),
    Fault("answers", "no_chat", refuses(lambda body: True, 500)),
    Fault("answers", "wrong_shape", plain(lambda body: body.pop("id"))),
    Fault("answers", "wrong_shape", plain(lambda body: body["choices"][0].update(finish_reason=None))),
    Fault("shows_its_model", "wrong_model_entry", Wrong(), kind="gateway"),
    # streaming
    Fault("comes_piece_by_piece", "buffered", Wrong(buffers=True), tokens_per_second=320),
    Fault("comes_piece_by_piece", "one_piece", streamed(one_piece)),
    Fault("comes_piece_by_piece", "not_a_stream", without("stream")),
    Fault("comes_piece_by_piece", "no_pieces", streamed(lambda events: events[-1:])),
    Fault("ends_with_done", "no_done", raw_stream(lambda body: body.removesuffix(b"data: [DONE]\n\n"))),
    Fault("ends_with_done", "unreadable_events", raw_stream(lambda body: b"data: {cut\n\n" + body)),
    Fault("says_why_it_ended", "finishes", streamed(no_finish)),
    Fault("says_why_it_ended", "finishes", streamed(lambda events: [*events, events[-1]])),
    Fault("says_why_it_ended", "text_after_finish", streamed(late_text)),
    Fault("has_the_shape_of_chunks", "wrong_shape", streamed(other_ids)),
    Fault("has_the_shape_of_chunks", "wrong_shape", streamed(no_role)),
    # Korean
    Fault("keeps_hangul_in_chunks", "broken_in_chunks", streamed(broken_syllables)),
    Fault("keeps_hangul_in_chunks", "invalid_utf8", raw_stream(cut_bytes)),
    Fault("returns_hangul", "hangul_broken", text(broken_value)),
    Fault("returns_hangul", "hangul_differs", without("response_format")),
    Fault("returns_hangul_streamed", "hangul_broken", streamed(broken_values)),
    Fault("returns_hangul_streamed", "hangul_differs", without("response_format")),
    Fault("repeats_korean", "hangul_broken", text(lambda content: content.replace("깻", "\ufffd"))),
    Fault("takes_korean_names", "refused", refuses(lambda body: not str(body.get("user", "")).isascii())),
    # history
    Fault("counts_earlier_turns", "history_not_counted", Wrong(asked=only_last_message)),
    Fault("recalls_a_fact", "not_recalled", Wrong(answered=forgets)),
    # errors
    *_error_faults(),
    Fault("missing_model", "accepted", Wrong(), kind="openai"),
    Fault("missing_model", "wrong_status", refuses(lambda body: "model" not in body, 500)),
    Fault("unknown_path", "wrong_status", CRASHED),
    Fault("unknown_path", "wrong_error_shape", IN_FASTAPIS_SHAPE, kind="gateway"),
    Fault("wrong_key", "any_key_taken", Wrong(key=b"Bearer sk-right"), key="sk-right", server_key="sk-right"),
    Fault("wrong_key", "wrong_status", CRASHED, key="sk-right", server_key="sk-right"),
    # concurrency
    Fault("answers_at_once", "not_all_answered", Wrong(most=5), tokens_per_second=800),
    Fault("answers_at_once", "not_all_answered", raw_stream(lambda body: body.removesuffix(b"data: [DONE]\n\n"))),
    # dialect
    Fault("usage", "no_usage", plain(lambda body: body.pop("usage"))),
    Fault("usage", "wrong_usage", plain(lambda body: body["usage"].update(total_tokens=0))),
    Fault("stream_options", "no_stream_usage", streamed(no_usage_chunk)),
    Fault("stream_options", "usage_with_choices", streamed(usage_with_choices)),
    Fault("stream_options", "usage_unasked", streamed(unasked_usage)),
    Fault("max_tokens", "too_many_tokens", without("max_tokens")),
    Fault("max_tokens", "wrong_finish", plain(lambda body: body["choices"][0].update(finish_reason="stop"))),
    Fault("max_completion_tokens", "too_many_tokens", without("max_completion_tokens")),
    Fault("stop", "stop_ignored", without("stop")),
    Fault("stop", "wrong_finish", plain(lambda body: body["choices"][0].update(finish_reason="length"))),
    Fault("several_choices", "choices_missing", without("n")),
    Fault("several_choices", "choices_not_numbered", plain(lambda body: body["choices"][-1].update(index=0))),
    Fault("logprobs", "no_logprobs", without("logprobs", "top_logprobs")),
    Fault(
        "logprobs",
        "wrong_logprobs",
        plain(lambda body: body["choices"][0]["logprobs"] and logprob(body).update(logprob=2)),
    ),
    Fault(
        "logprobs",
        "wrong_top_logprobs",
        plain(lambda body: body["choices"][0]["logprobs"] and logprob(body).update(top_logprobs=[])),
    ),
    Fault("roles", "refused", refuses(lambda body: body["messages"][0]["role"] == "developer", 400)),
    Fault("harmless_fields", "refused", refuses(lambda body: "unknown_field_of_verify" in body, 400)),
    Fault("image", "image_ignored", Wrong(asked=without_images)),
    Fault("image", "refused", refuses(lambda body: isinstance(body["messages"][-1]["content"], list), 500)),
    # tools
    Fault("named_tool", "no_call", without("tools", "tool_choice")),
    Fault("named_tool", "wrong_call", calls(lambda call: call["function"].update(name="get_time"))),
    Fault("named_tool", "wrong_call_shape", calls(lambda call: call.pop("id"))),
    Fault("named_tool", "arguments_not_json", calls(lambda call: call["function"].update(arguments="{"))),
    Fault(
        "named_tool", "arguments_off_schema", calls(lambda call: call["function"].update(arguments='{"city": "Paris"}'))
    ),
    Fault("named_tool_streamed", "no_call", without("tools", "tool_choice")),
    Fault("named_tool_streamed", "wrong_call_shape", stream_calls(lambda call: call.pop("id", None))),
    Fault("required_tool", "no_call", without("tools", "tool_choice")),
    Fault("no_tool", "called_anyway", plain(a_call)),
    Fault("tool_result", "refused", refuses(lambda body: body["messages"][-1]["role"] == "tool", 500)),
    Fault("json_schema", "not_json", without("response_format")),
    Fault("json_schema", "off_schema", text(lambda content: '{"colour": "green", "count": 1}')),
    Fault("json_object", "not_an_object", text(lambda content: "[1]")),
    Fault("json_object", "not_json", without("response_format")),
]

EMBEDDING_FAULTS: list[Fault] = [
    Fault("vectors", "vectors_missing", vectors(lambda data: data[:1])),
    Fault("vectors", "wrong_vectors", vectors(narrow_vector)),
    Fault("vectors", "same_vectors", vectors(same_vectors)),
    Fault("order_of_vectors", "vectors_out_of_order", vectors(swapped)),
    Fault("base64_vectors", "base64_differs", vectors(shifted_base64)),
    Fault("wrong_input", "accepted", Wrong(answered=accepts_anything)),
]
