"""The prompt of a chat as a chain of hashed blocks, by which prompts with a common beginning are known. Pure.

An engine's prefix cache keeps what it has computed for the beginning of a prompt, so two prompts
share cached work exactly as far as they are the same from the start (vLLM,
`v1/core/kv_cache_utils.py`, hashes blocks of tokens in the same way). The gateway has no tokenizer:
its blocks are pieces of text, and each message begins a new one.
"""

import sys
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, pairwise
from typing import NamedTuple
from zlib import crc32

from gateway.chat.message import Message
from gateway.chat.request import Chat
from gateway.chat.tools import Tool

SHORT = 1024
"""Characters of the longest message that is a single block."""
MAX_PARTS = 64
"""Parts of a message that are looked at, the first and the last ones."""
MAX_FIRST = 16
"""Messages of the first turn. If there are more before the first one of the user, they count as later ones."""
WORTH_CACHING = 256
"""Characters of the shortest prompt for which it matters what a server has cached: 64 tokens, a few
blocks of a prefix cache."""
FEW_MESSAGES = 3
"""Messages that are measured before anything is hashed: a short question needs no more."""
IMAGE_CHARACTERS = 4000
"""Size of an image, in characters of text that take as long: about 1,000 tokens."""
SAMPLE = 256
"""Characters at each end of a text, or of the address of an image, that stand for the whole of it."""
KEPT_TEXTS = 32
"""Long system messages whose blocks are remembered, so that they need not be hashed for each request."""
LONGEST_KEPT = 64 * 1024
"""Characters of the longest one."""
KEPT_ENDS = 20_000
"""Blocks of later turns whose ends are remembered, so that nobody counts their characters again."""
KEPT_TOOLS = 1000
"""Lists of tools whose characters are remembered."""
TAIL = 64
"""Characters at the end of a message that stand for it, in the turns after the first."""
LONG_ANSWER = 512
"""Characters of the longest answer after which no block ends."""
QUESTION = 256
"""Characters at the end of a long text that are in its last block alone, as a question about a document."""


def _text_places() -> Iterator[tuple[slice, int, int]]:
    """Yield for each block of a long text: the characters that are hashed, the end, and `grid`.

    If the text ends in this block, further ones end at multiples of `grid` (`_add`).

    A block has the same place in every text that begins in the same way, so places may depend on
    nothing but the distance from the beginning. Blocks far from it are longer, and few of their characters
    stand for the others: texts that have nothing to do with each other differ in these too.
    """
    ends = chain.from_iterable((1 << power, 3 << power - 1) for power in range(13, 24))
    for place, stop in pairwise((0, 1024, 2048, 4096, *ends, sys.maxsize)):
        step = 1 if stop <= 2048 else 8 if stop <= 8 * 1024 else 32 if stop <= 128 * 1024 else 64
        yield slice(place, stop, step), stop, min(max(QUESTION, (stop - place) // 8), 1 << 20)


_TEXT_PLACES = [*_text_places()]
_LINKS = [4 << 2 * power for power in range(10)]
"""Numbers of later messages after which a block ends."""


class PromptBlocks:
    """Blocks of one prompt.

    Attributes:
        hashes: a hash for each block and everything before it; only valid in this process.
        ends: number of characters up to the end of each block.
        common: number of blocks of the tools and the system message, which many conversations share.
        home: number that all turns of the conversation have in common, in every process.
        root: number of the tools and the system message, in every process; 0 without.
        is_continued: whether the conversation has an answer of the model already.
        is_counted: whether the size is that of this prompt, with no part of it remembered from an earlier one, which
            may have been changed.
        previous: index, counted from the end, of the block that ends where the previous prompt ended; 0 if that was
            the first turn, or if there was none.
        passing: indexes, counted from the end, of blocks that the prompts of later turns do not have, although
            they have the text.
        counts: numbers of known blocks by server, while one is chosen.
    """

    __slots__ = (
        "common",
        "counts",
        "ends",
        "hashes",
        "home",
        "is_continued",
        "is_counted",
        "passing",
        "previous",
        "root",
    )

    def __init__(
        self,
        hashes: list[int],
        ends: list[int],
        common: int,
        home: int,
        is_continued: bool,
        root: int = 0,
        passing: tuple[int, ...] = (),
        previous: int = 0,
        is_counted: bool = True,
    ) -> None:
        self.hashes = hashes
        self.ends = ends
        self.common = common
        self.home = home
        self.root = root
        self.is_continued = is_continued
        self.passing = passing
        self.previous = previous
        self.is_counted = is_counted
        self.counts: dict[object, int] = {}

    def __repr__(self) -> str:
        return f"<PromptBlocks {len(self.hashes)} blocks, {self.size} characters>"

    @property
    def size(self) -> int:
        """Number of characters."""
        return self.ends[-1]


class _Places(NamedTuple):
    """Places where the blocks of later turns end, with `passing` and `previous` of the prompt."""

    stops: list[tuple[int, bool]]
    """Numbers of messages after which a block ends, and whether those after it follow it."""
    passing: tuple[int, ...]
    previous: int


class _Chain:
    """The blocks so far: their hashes and ends, and the hash and the end of what has been added."""

    __slots__ = ("current", "end", "ends", "hashes", "is_counted")

    def __init__(self, current: int, end: int = 0) -> None:
        self.current = current
        self.end = end
        self.is_counted = True
        self.hashes: list[int] = []
        self.ends: list[int] = []

    def add(self, current: int, end: int) -> None:
        self.current, self.end = current, end
        self.hashes.append(current)
        self.ends.append(end)


def prompt_blocks(chat: Chat, model: str) -> PromptBlocks | None:
    """Return the blocks of `chat` for `model`, or None if it is not worth caching."""
    if len(chat.messages) <= FEW_MESSAGES and not chat.tools and sum(map(_size, chat.messages)) < WORTH_CACHING:
        return None
    blocks = _Chain(hash(model))
    root = tools = _add_tools(chat.tools, blocks) if chat.tools else 0
    common, home, count, messages = len(blocks.hashes), 0, 0, chat.messages
    passing: tuple[int, ...] = ()
    is_continued, previous = False, 0
    for message in messages:
        count += 1
        content, role = message.content, message.role
        if count == 1 and role == "system" and isinstance(content, str) and len(content) > SHORT:
            home = _add_system(content, blocks)
        else:
            _add(message, blocks)
            is_answer = role == "assistant"
            is_continued |= is_answer
            if not is_answer:
                home = _sampled(home, message)
            if role == "user" or count == MAX_FIRST:
                break
            if is_answer:
                continue
        root = home ^ tools
        common = len(blocks.hashes)
    if count < len(messages):
        answer = _last_answer(messages, count)
        is_continued = is_continued or answer >= count
        _, passing, previous = _add_later(messages, count, max(answer, count), blocks)
    if blocks.end < WORTH_CACHING:
        return None
    return PromptBlocks(
        blocks.hashes, blocks.ends, common, home, is_continued, root, passing, previous, blocks.is_counted
    )


_known_ends: dict[int, int] = {}
"""Ends of the blocks of later turns, by hash."""


def _remember_end(block: int, end: int) -> None:
    if len(_known_ends) >= KEPT_ENDS:
        _known_ends.clear()
    _known_ends[block] = end


_known_tools: dict[int, tuple[int, int]] = {}
"""Ends and numbers of the blocks of tools, by hash."""


def _add_tools(tools: list[Tool], blocks: _Chain) -> int:
    """Add one block for all tools, and return a number for them, the same in every process.

    Three of them, and how many there are, stand for all.
    """
    count = len(tools)
    first, middle, last = tools[0].function, tools[count // 2].function, tools[-1].function
    lengths = len(first.description or ""), len(last.description or "")
    current = hash((blocks.current, count, first.name, middle.name, last.name, lengths))
    known = _known_tools.get(current)
    if known is None:
        end = sum(len(tool.function.name) + len(tool.function.description or "") for tool in tools)
        known = end, crc32(f"{count},{first.name},{middle.name},{last.name}".encode(errors="surrogatepass"))
        if len(_known_tools) >= KEPT_TOOLS:
            _known_tools.clear()
        _known_tools[current] = known
    end, number = known
    blocks.add(current, end)
    return number


_known_texts: dict[tuple[int, int, int], tuple[str, _Chain, int]] = {}
"""Long system messages with their blocks and homes, by what precedes them and their lengths."""


def _add_system(text: str, blocks: _Chain) -> int:
    """Add the blocks of a long system message at the beginning, and return the home.

    Programs send the same ones again and again. Comparing a text costs a tenth of hashing it.
    """
    key = blocks.current, blocks.end, len(text)
    kept = _known_texts.get(key)
    if kept is None or kept[0] != text:
        message, own = Message("system", text), _Chain(blocks.current, blocks.end)
        _add(message, own)
        kept = text, own, _sampled(0, message)
        if len(text) <= LONGEST_KEPT:
            if len(_known_texts) >= KEPT_TEXTS:
                del _known_texts[next(iter(_known_texts))]
            _known_texts[key] = kept
    _, own, home = kept
    blocks.hashes += own.hashes
    blocks.ends += own.ends
    blocks.current, blocks.end = own.current, own.end
    return home


def _add_later(messages: list[Message], first: int, previous: int, blocks: _Chain) -> _Places:
    """Add the messages of all turns after the first one, from the one at index `first` on. Return where blocks end.

    The prompt of the turn before ended in front of the one at `previous`, the last answer if there is one.

    The last two of each block stand for all of it, because looking at all of them takes long. Requests that
    have nothing to do with each other differ in the first turn, and conversations that part later differ in
    all that follows. Only a program that changes messages far from the end may not be noticed. The choice is
    then less good.
    """
    current, end, hashes, ends, counted = blocks.current, blocks.end, blocks.hashes, blocks.ends, first
    has_long_answer = len(messages[previous].content or "") > LONG_ANSWER
    places = _places(len(messages) - first, previous - first, has_long_answer)
    known_end, is_counted = _known_ends.get, True
    for stop, is_link in places.stops:
        stop += first
        last, before = messages[stop - 1], messages[stop - 2].content
        content = last.content
        mark = content[-TAIL:] if content.__class__ is str and last.tool_calls is None else _mark(last)
        mark_before = before[-TAIL:] if before.__class__ is str else None
        block = hash((current, stop, mark, len(content or ""), mark_before, len(before or "")))
        known = known_end(block)
        if known is None:
            known = end + sum(map(_size, messages[counted:stop]))
            _remember_end(block, known)
        else:
            is_counted = False
        counted = stop
        if known > end:
            end = known
        hashes.append(block)
        ends.append(end)
        if is_link:
            current = block
    blocks.end, blocks.is_counted = end, is_counted
    return places


def _last_answer(messages: list[Message], first: int) -> int:
    """Return the index of the last message of the assistant from `first` on, or `first - 1`."""
    index = len(messages) - 1
    while index >= first and messages[index].role != "assistant":
        index -= 1
    return index


@lru_cache(maxsize=4096)
def _places(count: int, previous: int, has_long_answer: bool) -> _Places:
    """Return where the blocks of `count` later messages end. The previous prompt had `previous` of them.

    They are few, because each costs time: some powers of two. Most important is where the previous prompt
    ended, so a block ends there. Another one ends after a long answer, since several questions may be asked about
    it, and the last one at the end. No other block follows these.
    """
    links = [stop for stop in _LINKS if stop <= count]
    answered = previous + 1 if has_long_answer else count
    stops = sorted({*links, previous, answered, count} - {0})
    passing = tuple(index - len(stops) for index, stop in enumerate(stops[:-1]) if stop not in links)
    at = stops.index(previous) - len(stops) if previous else 0
    return _Places([(stop, stop in links) for stop in stops], passing, at)


def _mark(message: Message) -> object:
    """Return what stands for a message that is more than a text."""
    message = _bounded(message)
    if calls := message.tool_calls:
        call = calls[-1].function
        return call.name, call.arguments[-TAIL:], len(calls)
    images = [(len(url), url[:SAMPLE], url[-SAMPLE:]) for url in message.images]
    return message.text[-TAIL:], *images


def _size(message: Message) -> int:
    """Return the size of a message in characters."""
    content, calls = message.content, message.tool_calls
    if isinstance(content, str) and calls is None:
        return len(content)
    message = _bounded(message)
    arguments = sum(len(call.function.arguments) for call in calls or ())
    return len(message.text) + arguments + IMAGE_CHARACTERS * len(message.images)


def _add(message: Message, blocks: _Chain) -> None:
    """Add the blocks of one message.

    In the last block of a long text, two more end near the end of the text: many prompts are a document with one
    of several questions after it, or a text that grows. Theirs are round places, to be the same for texts of
    about the same length. The last block does not follow them.
    """
    content, role = message.content, message.role
    if isinstance(content, str) and len(content) <= SHORT and message.tool_calls is None:
        blocks.add(hash((blocks.current, role, content)), blocks.end + len(content))
        return
    message = _bounded(message)
    current, end = hash((blocks.current, role)), blocks.end
    text = message.text
    length, hashes, ends = len(text), blocks.hashes, blocks.ends
    for sample, stop, grid in _TEXT_PLACES:
        if stop >= length:
            place, step = sample.start, sample.step
            for near in ((length // (2 * grid) - 1) * 2 * grid, (length - QUESTION) // grid * grid):
                if near > place:
                    hashes.append(hash((current, text[place:near:step])))
                    ends.append(end + near)
            current = hash((current, text[sample], text[-TAIL:]))
            break
        current = hash((current, text[sample]))
        hashes.append(current)
        ends.append(end + stop)
    end += length
    for call in message.tool_calls or ():
        current = hash((current, call.function.name, call.function.arguments))
        end += len(call.function.arguments)
    for url in message.images:
        current = hash((current, len(url), url[:SAMPLE], url[-SAMPLE:]))
        end += IMAGE_CHARACTERS
    blocks.add(current, end)


def _sampled(home: int, message: Message) -> int:
    """Return `home` continued with a message, of which both ends stand for the whole."""
    content = message.content
    if isinstance(content, str) and len(content) <= SHORT:
        return crc32(content.encode("utf-8", "surrogatepass"), home)
    message = _bounded(message)
    for text in (message.text, *message.images):
        sample = text if len(text) <= SHORT else f"{len(text)}:{text[:SAMPLE]}:{text[-SAMPLE:]}"
        home = crc32(sample.encode(errors="surrogatepass"), home)
    return home


def _bounded(message: Message) -> Message:
    """Return a message without the parts in the middle if it has very many: 100,000 would take 50 ms."""
    content = message.content
    if not isinstance(content, list) or len(content) <= MAX_PARTS:
        return message
    return Message(message.role, content[: MAX_PARTS // 2] + content[-MAX_PARTS // 2 :], message.tool_calls)
