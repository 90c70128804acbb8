"""Messages about mistakes: they never contain secrets."""

import pytest

from tests.config.harness import SECRET, problems

pytestmark = pytest.mark.usefixtures("empty_environment")


@pytest.mark.parametrize(
    "text",
    [
        f"api_keys: ['{SECRET} x']",
        f"admin_key: '{SECRET}\u00e9'",
        f"backends: {{ollama: {{api_key: ['{SECRET}']}}}}",
        f"backends: {{ollama: {{headers: {{x-key: \"{SECRET}\\n\"}}}}, vllm: {{headers: '{SECRET}'}}}}\nllm_backend: x",
        f"backends: {{ollama: {{base_url: 'http://user:{SECRET}@host'}}}}",
        f"backends: {{ollama: {{base_url: 'http://host/?key={SECRET}'}}}}",
        f"admin_key: {SECRET}\napi_keys: [{SECRET}]",
        f"admin_key: *{SECRET}",
    ],
)
def test_no_message_contains_a_secret_of_the_file(text: str) -> None:
    assert not any(SECRET in line for line in problems(text + "\nport: x"))


def test_no_message_contains_a_secret_of_a_variable() -> None:
    environ = {
        "GATEWAY_API_KEYS": f"{SECRET},,b",
        "GATEWAY_ADMIN_KEY": f"{SECRET} x",
        "GATEWAY__BACKENDS__VLLM__HEADERS": f'{{"authorization": "{SECRET}"',
        "VLLM_API_KEY": f"{SECRET}\u00e9",
        "OLLAMA_BASE_URL": f"http://u:{SECRET}@h",
    }
    found = problems(environ=environ)
    assert {line.partition(":")[0] for line in found} == set(environ)
    assert SECRET not in "\n".join(found)
