"""What real client programs do: each a small program that asserts what OpenAI's API promises it, whichever engine answers."""

import pytest

pytest.register_assert_rewrite(
    f"{__name__}.langchain", f"{__name__}.llama_index", f"{__name__}.openai_python", f"{__name__}.place"
)
