"""Prompts: built in, made up in a given length, and from a JSONL file."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from gateway.bench.images import InvalidImage, read_image
from gateway.bench.target import BenchImage, BenchRequest

QUESTIONS: dict[str, tuple[str, ...]] = {
    "ko": (
        "사내 LLM 서버를 운영할 때 동시 요청을 처리하는 방법을 자세히 설명해 주세요.",
        "KV 캐시가 무엇이고 왜 GPU 메모리를 많이 쓰는지 예를 들어 설명해 주세요.",
        "폐쇄망 환경에서 언어 모델을 배포하는 절차를 단계별로 적어 주세요.",
        "파이썬으로 로그 파일에서 오류를 집계하는 프로그램을 작성하고 설명해 주세요.",
        "회의록을 요약할 때 지켜야 할 원칙을 다섯 가지 들고 이유를 써 주세요.",
        "서울에서 부산까지 가는 여러 교통편을 비용과 시간으로 비교해 주세요.",
        "신입 개발자를 위한 코드 리뷰 지침을 작성해 주세요.",
        "데이터베이스 색인이 조회를 빠르게 하는 원리를 쉽게 설명해 주세요.",
    ),
    "en": (
        "Explain in detail how an LLM server handles several requests at the same time.",
        "What is a KV cache, and why does it need so much GPU memory? Give an example.",
        "Describe step by step how to deploy a language model in a network without internet access.",
        "Write a Python program that counts the errors in a log file, and explain it.",
        "Name five principles for good meeting minutes and give a reason for each.",
        "Compare ways to travel from Seoul to Busan by cost and time.",
        "Write code review guidelines for a new developer.",
        "Explain in simple words how a database index makes a query fast.",
    ),
    "ja": (
        "LLMサーバーが複数のリクエストを同時に処理する方法を詳しく説明してください。",
        "KVキャッシュとは何か、なぜGPUメモリを多く使うのか例を挙げて説明してください。",
        "インターネットに接続できない環境で言語モデルを配備する手順を書いてください。",
        "ログファイルのエラーを集計するPythonプログラムを書いて説明してください。",
    ),
}
"""Questions by language, each of which asks for a long answer."""

GREETINGS = {"ko": "안녕", "en": "Hello", "ja": "こんにちは"}
IMAGE_QUESTIONS = {"ko": "이 이미지를 자세히 설명해 주세요.", "en": "Describe this image in detail.",
                   "ja": "この画像を詳しく説明してください。"}  # fmt: skip

_COMMON_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father "
    "power hour game line end member law car city community name team minute idea body back parent face others level "
    "office door health person art war history party result change morning reason research girl guy moment air teacher "
    "force education"
)
_WORDS = tuple(_COMMON_WORDS.split())
"""Common words; most tokenizers have one token for each."""

DEFAULT_TOKENS_PER_WORD = 1.0


class InvalidDataset(ValueError):
    """A dataset cannot be used; the message names file and line."""


def user(text: str) -> tuple[Mapping[str, str], ...]:
    """Return a conversation of one message."""
    return ({"role": "user", "content": text},)


def numbered(number: int, text: str) -> str:
    """Put a number first, so that no two prompts share a beginning that an engine may have cached."""
    return f"{number}. {text}"


def made_up_text(tokens: int, rng: random.Random, tokens_per_word: float = DEFAULT_TOKENS_PER_WORD) -> str:
    """Return random common words that are about `tokens` tokens long."""
    return " ".join(rng.choices(_WORDS, k=max(1, round(tokens / tokens_per_word))))


@dataclass(frozen=True, slots=True)
class TokenRatio:
    """Number of tokens that a server counts: `per_word` for each made-up word, and `fixed` for the chat template."""

    per_word: float
    fixed: float

    @classmethod
    def of(cls, few: tuple[int, int], many: tuple[int, int]) -> "TokenRatio":
        """Compute the ratio from two pairs of words and tokens.

        Raises:
            ValueError: the counts do not grow with the words, as when a server reports only what it has
                not cached.
        """
        (few_words, few_tokens), (many_words, many_tokens) = few, many
        per_word = (many_tokens - few_tokens) / (many_words - few_words)
        if not 0.25 <= per_word <= 8:
            raise ValueError(f"{few_words} words are {few_tokens} tokens and {many_words} are {many_tokens}")
        return cls(per_word, few_tokens - few_words * per_word)


def built_in(number: int, languages: Sequence[str], seed: int = 0) -> tuple[str, str]:
    """Return language and text of a built-in question; numbers, from 0, take the languages in turn."""
    language = languages[number % len(languages)]
    questions = QUESTIONS[language]
    return language, numbered(number + 1, questions[(seed + number // len(languages)) % len(questions)])


def read_dataset(path: Path) -> list[BenchRequest]:
    """Read a JSONL file, one request a line, in the order of the file.

    A line has `prompt` (a string) or `messages`, and may have `output_tokens` or `max_tokens`, `images`
    (paths, relative to the file), `model`, `language` and `name`. The format of
    `vllm bench serve --dataset-name custom` is a part of this.

    Raises:
        InvalidDataset: the file is unreadable or empty, or a line is wrong.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # a JSON text may contain U+2028, at which `splitlines` splits
    except (OSError, UnicodeDecodeError) as problem:
        raise InvalidDataset(f"{path}: {getattr(problem, 'strerror', None) or 'not UTF-8 text'}") from problem
    requests = [_request(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise InvalidDataset(f"{path}: no requests")
    return requests


def _request(path: Path, number: int, line: str) -> BenchRequest:
    where = f"{path}:{number}"
    try:
        row = orjson.loads(line)  # takes only what can be sent again: no NaN, no half of a character
    except orjson.JSONDecodeError as problem:
        raise InvalidDataset(f"{where}: not JSON: {problem.msg}") from problem
    if not isinstance(row, dict):
        raise InvalidDataset(f"{where}: expected an object")
    tokens = row.get("output_tokens", row.get("max_tokens"))
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise InvalidDataset(f"{where}: output_tokens must be a positive integer")
    texts = [row.get(name) or "" for name in ("model", "language", "name")]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidDataset(f"{where}: model, language and name must be strings")
    model, language, name = texts
    images = tuple(_images(where, path, row))
    return BenchRequest(_messages(where, row), tokens, images=images, model=model, language=language, name=name)


def _messages(where: str, row: dict[str, Any]) -> tuple[Mapping[str, str], ...]:
    if isinstance(prompt := row.get("prompt"), str) and prompt:
        return user(prompt)
    messages = row.get("messages")
    is_whole = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
    )
    if not is_whole:
        raise InvalidDataset(f"{where}: expected `prompt`, or `messages` with a role and a text each")
    assert isinstance(messages, list)
    return tuple(messages)


def _images(where: str, path: Path, row: dict[str, Any]) -> Iterator[BenchImage]:
    names = row.get("images") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidDataset(f"{where}: images must be a list of paths")
    for name in names:
        try:
            yield read_image(path.parent / name)
        except InvalidImage as problem:
            raise InvalidDataset(f"{where}: {problem}") from problem
