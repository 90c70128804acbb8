"""Write two tiny models with random weights that vLLM can serve: `python -P make_models.py FOLDER`.

`tiny-qwen3` accepts text, `tiny-qwen3-vl` also images. At temperature 0 neither model ends an
answer itself, nor generates a token that is not complete text (part of a character, markup): the
score of such tokens is always 0, and that of the best other token never is. With entirely random
weights, when such a token appears would depend on the processor's rounding. Run it with the Python
of vLLM's environment, and with `-P`, so that `vllm.py` in this folder is not imported instead of
the engine.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE, VIDEO]  # their ids: 0, 1, 2, …
VOCABULARY_SIZE = 1024
TOKENIZER_TEXT = Path(__file__).with_name("tokenizer_text.txt")
"""Text that the tokenizer is trained on: an early version of this file. It must not change."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# Small, but of a shape that vLLM's kernels accept: heads of 32, hidden size a multiple of 64.
TEXT_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
PATCH: dict[str, int] = {"patch_size": 16, "temporal_patch_size": 2}
VISION_SHAPE: dict[str, Any] = {
    **PATCH,
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": TEXT_SHAPE["hidden_size"],
    "spatial_merge_size": 2,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [0, 1],
}
# The three sections of the rotary embedding (time, height, width) add up to half a head.
ROTARY = {"rope_type": "default", "mrope_section": [4, 6, 6], "mrope_interleaved": True}
# 4 to 64 patches of 32 by 32 pixels after merging, so an image costs only a few tokens.
IMAGE_PROCESSING: dict[str, Any] = {
    **PATCH,
    "merge_size": 2,
    "size": {"shortest_edge": 64 * 64, "longest_edge": 256 * 256},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}


def token_id(token: str) -> int:
    return SPECIAL_TOKENS.index(token)


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a byte-level BPE tokenizer, which can encode any text.

    Its merges are learned from a fixed text: with other merges, the same random weights say
    something else, and tests that need a certain kind of answer may not get it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT.read_text(encoding="utf-8").splitlines(), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=END_OF_TEXT)
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return wrapped


def write_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    unsaid = [
        token
        for token in range(VOCABULARY_SIZE)
        if token < len(SPECIAL_TOKENS) or "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([token])
    ]
    with torch.no_grad():
        model.get_output_embeddings().weight[unsaid] = 0
    model.to(torch.bfloat16).save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "eos_token_id": token_id(TURN_END)}, indent=2))


def write_text_model(folder: Path) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**TEXT_SHAPE, tie_word_embeddings=True))
    write_model(folder, model, write_tokenizer(folder))


def write_vision_model(folder: Path) -> None:
    configuration = Qwen3VLConfig(
        text_config={**TEXT_SHAPE, "rope_scaling": ROTARY},
        vision_config=VISION_SHAPE,
        image_token_id=token_id(IMAGE),
        video_token_id=token_id(VIDEO),
        vision_start_token_id=token_id(VISION_START),
        vision_end_token_id=token_id(VISION_END),
    )
    write_model(folder, Qwen3VLForConditionalGeneration(configuration), write_tokenizer(folder))
    images = {**IMAGE_PROCESSING, "image_processor_type": "Qwen2VLImageProcessorFast"}
    videos = {**IMAGE_PROCESSING, "video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))


def main(root: Path) -> None:
    torch.manual_seed(0)
    for name, write in (("tiny-qwen3", write_text_model), ("tiny-qwen3-vl", write_vision_model)):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
