"""Made-up requests of the sizes of recorded ones. Pure.

Requests of one conversation begin alike, turn by turn, and those with the same system message have
the same made-up one: so an engine's prefix cache and a gateway's affinity find what they found
in the real traffic.
"""

import math
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import overload

from gateway.bench.images import make_images
from gateway.bench.prompts import TokenRatio, made_up_text
from gateway.bench.recording import Recording
from gateway.bench.target import BenchImage, BenchRequest
from gateway.telemetry.recording import RecordedExchange

IMAGE_VARIANTS = 8
"""Different images of each size."""
DEFAULT_PIXELS = 512 * 512
LEAST_SIDE, LARGEST_SIDE = 8, 8192
SHORTEST_TURN = 2
"""Words by which a turn has to be longer than the one before: one of the assistant, one of the user."""


class ReplayedRequests(Sequence[BenchRequest]):
    """Requests of a recording, each made when it is asked for.

    `sends_tiers` sends the recorded tier as the model. `parameters` are those of every request.
    """

    def __init__(
        self,
        recording: Recording,
        ratio: TokenRatio | None,
        *,
        seed: int = 0,
        sends_tiers: bool = False,
        timeout: float | None = None,
        parameters: dict[str, object] | None = None,
    ) -> None:
        self._recording = recording
        self._ratio = ratio or TokenRatio(1.0, 0.0)
        self._tokens_per_character = recording.tokens_per_character
        self._usual_completion = recording.usual_completion
        self._seed = seed
        self._sends_tiers = sends_tiers
        self._timeout = timeout
        self._parameters = {"ignore_eos": True, **(parameters or {})}
        self._turns: dict[str, list[int]] = {}
        """Lengths of each conversation's turns, in words from its beginning."""
        for index, item in enumerate(recording.exchanges):
            self._note_turn(index, item)

    def __len__(self) -> int:
        return len(self._recording.exchanges)

    @overload
    def __getitem__(self, index: int) -> BenchRequest: ...

    @overload
    def __getitem__(self, index: slice) -> list[BenchRequest]: ...

    def __getitem__(self, index: int | slice) -> BenchRequest | list[BenchRequest]:
        if isinstance(index, slice):
            return [self._request(place) for place in range(*index.indices(len(self)))]
        return self._request(range(len(self))[index])

    def __iter__(self) -> Iterator[BenchRequest]:
        return map(self._request, range(len(self)))

    def _note_turn(self, index: int, item: RecordedExchange) -> None:
        turns = self._turns.setdefault(self._conversation(index, item), [])
        words = self._user_words(item)
        if not turns or words >= turns[-1] + SHORTEST_TURN:
            turns.append(words)

    def _conversation(self, index: int, item: RecordedExchange) -> str:
        return item.conversation or f"request {index}"

    def _words(self, item: RecordedExchange) -> int:
        """Return how many made-up words have as many tokens as the request's texts.

        The tokens of images are not told apart from those of the text, so the characters count there.
        """
        tokens = item.characters * self._tokens_per_character
        if item.prompt_tokens and not item.images:
            tokens = item.prompt_tokens - self._ratio.fixed
        return max(1, round(tokens / self._ratio.per_word))

    def _prefix_words(self, item: RecordedExchange) -> int:
        if not item.prefix:
            return 0
        return max(1, round(item.prefix_characters * self._tokens_per_character / self._ratio.per_word))

    def _user_words(self, item: RecordedExchange) -> int:
        """Return the words after the system message: at least one."""
        return max(1, self._words(item) - self._prefix_words(item))

    def _request(self, index: int) -> BenchRequest:
        item = self._recording.exchanges[index]
        name = self._conversation(index, item)
        messages = (
            []
            if not item.prefix
            else [{"role": "system", "content": self._text(item.prefix, self._prefix_words(item))}]
        )
        messages += self._turns_of(name, self._user_words(item))
        return BenchRequest(
            tuple(messages),
            item.completion_tokens or self._usual_completion,
            images=tuple(self._images(name, item)),
            model=item.tier if self._sends_tiers else "",
            name=item.tier,
            parameters=self._parameters,
            timeout=self._timeout,
            stream=item.stream,
        )

    def _turns_of(self, conversation: str, words: int) -> list[dict[str, str]]:
        """Return the turns up to `words`. Earlier requests of the conversation have the same first ones."""
        text = self._text(conversation, words).split(" ")
        ends = [end for end in self._turns[conversation] if end <= words - SHORTEST_TURN] + [words]
        messages, begin = [], 0
        for end in ends:
            middle = begin + (end - begin) // 2 if begin else begin
            if begin:
                messages.append({"role": "assistant", "content": " ".join(text[begin:middle])})
            messages.append({"role": "user", "content": " ".join(text[middle:end])})
            begin = end
        return messages

    def _text(self, name: str, words: int) -> str:
        """Return so many words; fewer of the same `name` are the beginning of more."""
        return made_up_text(words, random.Random(f"{self._seed}/{name}"))

    def _images(self, conversation: str, item: RecordedExchange) -> Iterator[BenchImage]:
        for number, (pixels, _) in enumerate(item.images):
            side = min(LARGEST_SIDE, max(LEAST_SIDE, math.isqrt(pixels or DEFAULT_PIXELS)))
            variant = random.Random(f"{self._seed}/{conversation}/{number}").randrange(IMAGE_VARIANTS)
            yield _variants(side, self._seed)[variant]


@lru_cache(maxsize=16)
def _variants(side: int, seed: int) -> list[BenchImage]:
    return make_images(IMAGE_VARIANTS, side, seed)
