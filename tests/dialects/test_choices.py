"""One choice keeps its answer, its usage or its error for the whole answer, and writes nothing."""

from gateway.chat.answer import Answer, Timings, Usage
from gateway.dialects.choices import KeptChoice
from gateway.errors import QueueFull


def test_a_whole_choice_is_kept_with_its_usage() -> None:
    choice = KeptChoice(1)
    assert not choice.is_complete
    answer = Answer("a", "", "stop", Usage(2, 1), [], None)
    assert choice.answer("1", 0, answer, lambda: Timings(0, 0, 0, 0)) == b""
    assert (choice.whole, choice.usage, choice.is_complete, choice.error) == (answer, Usage(2, 1), True, None)


def test_a_failed_choice_keeps_its_error_and_is_not_complete() -> None:
    choice, error = KeptChoice(0), QueueFull("full", retry_after=1)
    assert choice.error_body(error) == b""
    assert (choice.error, choice.is_complete, choice.whole) == (error, False, None)
