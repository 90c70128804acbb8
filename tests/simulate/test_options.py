"""Options of a stand-in, as the command line writes them."""

import pytest

from gateway.simulate import Model, Options


def test_model_is_parsed_from_comma_separated_options() -> None:
    assert Model.parse("a:7b,vision,tools,context=8192") == Model(
        "a:7b", family="qwen3vl", vision=True, tools=True, context_length=8192
    )


def test_unknown_model_option_is_rejected() -> None:
    with pytest.raises(ValueError, match="unknown model option 'flying'"):
        Model.parse("a,flying")


def test_settings_set_options_by_name() -> None:
    options = Options("ollama").with_settings(["memory=100", "image_slowdown=0.14", "gpu=yes", "repeat_word=stutter"])
    assert (options.memory, options.image_slowdown, options.gpu, options.repeat_word) == (100, 0.14, True, "stutter")


@pytest.mark.parametrize("setting", ["memory", "nothing=1", "gpu=1", "memory=x", "kind=vllm", "models=a"])
def test_invalid_setting_is_rejected(setting: str) -> None:
    with pytest.raises(ValueError, match=r"unknown option|must be yes or no|invalid literal"):
        Options("ollama").with_settings([setting])
