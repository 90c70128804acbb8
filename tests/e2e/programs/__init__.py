"""Small programs on real client libraries; each asserts what OpenAI's API promises, on any
engine.
"""

import pytest

pytest.register_assert_rewrite(
    f"{__name__}.langchain",
    f"{__name__}.llama_index",
    f"{__name__}.ollama_clients",
    f"{__name__}.openai_python",
    f"{__name__}.target",
)
