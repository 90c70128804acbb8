import json
import random
from pathlib import Path

import pytest

from gateway.bench.images import make_images
from gateway.bench.prompts import QUESTIONS, InvalidDataset, TokenRatio, built_in, made_up_text, read_dataset


def dataset(folder: Path, *rows: object) -> Path:
    path = folder / "set.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return path


def test_korean_questions_are_built_in() -> None:
    language, text = built_in(0, ("ko",))
    assert (language, text) == ("ko", f"1. {QUESTIONS['ko'][0]}")


def test_another_seed_begins_with_another_question() -> None:
    assert built_in(0, ("ko",), 0) != built_in(0, ("ko",), 1)


def test_made_up_text_has_the_length_that_the_ratio_gives() -> None:
    assert len(made_up_text(100, random.Random(1)).split()) == 100
    assert len(made_up_text(100, random.Random(1), 2.0).split()) == 50


def test_the_ratio_separates_words_from_the_chat_template() -> None:
    ratio = TokenRatio.of((20, 45), (220, 345))
    assert (ratio.per_word, ratio.fixed) == (1.5, 15.0)


def test_counts_that_do_not_grow_give_no_ratio() -> None:
    with pytest.raises(ValueError, match="20 words are 30 tokens"):
        TokenRatio.of((20, 30), (220, 30))


def test_a_dataset_of_vllm_is_read(tmp_path: Path) -> None:
    path = dataset(tmp_path, {"prompt": "질문", "output_tokens": 12}, "", {"prompt": "b"})
    assert [(item.messages[0]["content"], item.max_tokens) for item in read_dataset(path)] == [
        ("질문", 12),
        ("b", None),
    ]


def test_a_dataset_may_have_conversations_and_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(make_images(1, 8)[0].data)
    row = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "images": ["a.png"],
           "model": "m", "language": "ko", "name": "n", "max_tokens": 3}  # fmt: skip
    (read,) = read_dataset(dataset(tmp_path, row))
    assert [message["role"] for message in read.messages] == ["system", "user"]
    assert (read.images[0].name, read.model, read.language, read.name, read.max_tokens) == ("a.png", "m", "ko", "n", 3)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ({"prompt": ""}, "expected `prompt`"),
        ({"messages": [{"role": "user"}]}, "expected `prompt`"),
        ({"prompt": "a", "output_tokens": 0}, "positive integer"),
        ({"prompt": "a", "output_tokens": "9"}, "positive integer"),
        ({"prompt": "a", "model": 3}, "must be strings"),
        ({"prompt": "a", "images": ["no.png"]}, "no.png"),
        ({"prompt": "a", "images": "no.png"}, "list of paths"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: object, problem: str) -> None:
    with pytest.raises(InvalidDataset, match=rf"set.jsonl:2: .*{problem}"):
        read_dataset(dataset(tmp_path, {"prompt": "a"}, row))


def test_a_missing_or_empty_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="No such file"):
        read_dataset(tmp_path / "no.jsonl")
    with pytest.raises(InvalidDataset, match="no requests"):
        read_dataset(dataset(tmp_path, ""))


def test_a_dataset_of_windows_and_one_with_unusual_line_separators_are_read(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_bytes('\ufeff{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "안녕"}\r\n'.encode())
    texts = [request.messages[0]["content"] for request in read_dataset(file)]
    assert texts == ["a\u2028b\x85c", "안녕"]


@pytest.mark.parametrize(
    "line", [r'{"prompt": "a\ud800b"}', '{"prompt": ' + "[" * 100_000, '{"prompt": "a", "output_tokens": NaN}']
)
def test_what_could_not_be_sent_as_json_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(InvalidDataset, match=r"set.jsonl:1: not JSON"):
        read_dataset(dataset(tmp_path, line))


def test_a_number_of_tokens_beyond_64_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="positive integer"):
        read_dataset(dataset(tmp_path, '{"prompt": "a", "output_tokens": 99999999999999999999999}'))
