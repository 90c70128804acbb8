"""The prompt of a chat as a chain of hashed blocks, by which prompts with a common beginning are known. Pure.

An engine's prefix cache keeps what it has computed for the beginning of a prompt, so two prompts
share cached work exactly as far as they are the same from the start (vLLM,
`v1/core/kv_cache_utils.py`, hashes blocks of tokens in the same way). The gateway has no tokenizer:
its blocks are pieces of text, and each message begins a new one.
"""

from itertools import chain, pairwise
from zlib import crc32

from gateway.chat.message import Message
from gateway.chat.request import Chat

MAX_BLOCKS = 512
"""Blocks of a prompt after which no further message counts."""
SHORT = 1024
"""Characters of the longest message that is a single block."""
WORTH_CACHING = 256
"""Characters of the shortest prompt for which it matters what a server has cached: 64 tokens, a few
blocks of a prefix cache."""
IMAGE_CHARACTERS = 4000
"""Size of an image, in characters of text that take as long: about 1,000 tokens."""
SAMPLE = 1024
"""Characters at each end of a text, or of the address of an image, that stand for the whole of it."""
STEP = 64
"""Distance between two characters that are hashed, in the turns after the first.

Requests that have nothing to do with each other differ before that, in the turn that is hashed whole. A change
of an earlier turn that is shorter than this may not be noticed. The choice is then less good.
"""
TAIL = 512
"""Number of characters at the end of a prompt that are all hashed."""
KEPT_TEXTS = 32
"""Long system messages whose blocks are remembered, so that they need not be hashed for each request."""
LONGEST_KEPT = 64 * 1024
"""Characters of the longest one."""

# A block has the same place in every text that begins in the same way, so places may depend on
# nothing but the distance from the beginning. Blocks far from it are longer.
_PLACES = [
    *pairwise(
        chain(
            range(0, 4 * 1024, SHORT),
            range(4 * 1024, 16 * 1024, 2048),
            range(16 * 1024, 128 * 1024, 4096),
            range(128 * 1024, 1 << 24, 64 * 1024),
        )
    )
]
_LATER_PLACES = [*pairwise(chain((0, *(1024 << n for n in range(6))), range(64 * 1024, 1 << 24, 64 * 1024)))]
"""Places in the text of all turns after the first.

They are few, because each costs time. Most important is where the previous prompt ended, and that has a
block of its own.
"""


class PromptBlocks:
    """Blocks of one prompt.

    Attributes:
        hashes: a hash for each block and everything before it; only valid in this process.
        ends: number of characters up to the end of each block.
        common: number of blocks of the tools and the system message, which many conversations share.
        home: number that all turns of the conversation have in common, in every process.
        root: number of the tools and the system message, in every process; 0 without.
        is_continued: whether the conversation has an answer of the model already.
        counts: numbers of known blocks by server, while one is chosen.
    """

    __slots__ = ("common", "counts", "ends", "hashes", "home", "is_continued", "root")

    def __init__(
        self, hashes: list[int], ends: list[int], common: int, home: int, is_continued: bool, root: int = 0
    ) -> None:
        self.hashes = hashes
        self.ends = ends
        self.common = common
        self.home = home
        self.root = root
        self.is_continued = is_continued
        self.counts: dict[object, int] = {}

    def __repr__(self) -> str:
        return f"<PromptBlocks {len(self.hashes)} blocks, {self.size} characters>"

    @property
    def size(self) -> int:
        """Number of characters."""
        return self.ends[-1]

    @property
    def is_whole(self) -> bool:
        """Whether all messages count in `size`."""
        return len(self.hashes) < MAX_BLOCKS


class _Chain:
    """The blocks so far: their hashes and ends, and the hash and the end of what has been added."""

    __slots__ = ("current", "end", "ends", "hashes")

    def __init__(self, current: int) -> None:
        self.current = current
        self.end = 0
        self.hashes: list[int] = []
        self.ends: list[int] = []

    def add(self, current: int, end: int) -> None:
        self.current, self.end = current, end
        self.hashes.append(current)
        self.ends.append(end)


def prompt_blocks(chat: Chat, model: str) -> PromptBlocks | None:
    """Return the blocks of `chat` for `model`, or None if it is not worth caching."""
    blocks = _Chain(hash(model))
    if chat.tools:
        _add_tools(chat, blocks)
    root = tools = _number_of_tools(chat) if chat.tools else 0
    common, home, count, messages = len(blocks.hashes), 0, 0, chat.messages
    for message in messages:
        count += 1
        content, role = message.content, message.role
        if count == 1 and role == "system" and isinstance(content, str) and len(content) > SHORT:
            home = _add_system(content, blocks)
        else:
            _add(message, blocks)
            if role == "assistant":
                continue
            home = _sampled(home, message)
            if role == "user":
                break
        root = home ^ tools
        common = len(blocks.hashes)
    if count < len(messages):
        if chat.has_plain_messages:
            _add_texts([message.content for message in messages[count:]], blocks)  # type: ignore[misc]  # all are texts
        else:
            for message in messages[count:]:
                if len(blocks.hashes) < MAX_BLOCKS:
                    _add(message, blocks)
    if blocks.end < WORTH_CACHING:
        return None
    is_continued = any(message.role == "assistant" for message in messages)
    return PromptBlocks(blocks.hashes, blocks.ends, common, home, is_continued, root)


def _add_tools(chat: Chat, blocks: _Chain) -> None:
    """Add one block for all tools."""
    current, end = blocks.current, 0
    for tool in chat.tools or ():
        function = tool.function
        current = hash((current, function.name, function.description))
        end += len(function.name) + len(function.description or "")
    blocks.add(current, end)


def _number_of_tools(chat: Chat) -> int:
    """Return a number for the names of the tools, the same in every process."""
    return crc32(",".join([tool.function.name for tool in chat.tools or ()]).encode(errors="surrogatepass"))


_known_texts: dict[tuple[int, int], tuple[str, _Chain, int]] = {}
"""Long system messages with their blocks and homes, by what precedes them and their lengths."""


def _add_system(text: str, blocks: _Chain) -> int:
    """Add the blocks of a long system message at the beginning, and return the home.

    Programs send the same ones again and again. Comparing a text costs a tenth of hashing it.
    """
    key = blocks.current, len(text)
    kept = _known_texts.get(key)
    if kept is None or kept[0] != text:
        message, own = Message("system", text), _Chain(blocks.current)
        _add(message, own)
        kept = text, own, _sampled(0, message)
        if len(text) <= LONGEST_KEPT:
            if len(_known_texts) >= KEPT_TEXTS:
                del _known_texts[next(iter(_known_texts))]
            _known_texts[key] = kept
    _, own, home = kept
    start = blocks.end
    blocks.hashes += own.hashes
    blocks.ends += own.ends if not start else [start + end for end in own.ends]
    blocks.current, blocks.end = own.current, start + own.end
    return home


def _add_texts(texts: list[str], blocks: _Chain) -> None:
    """Add the texts of all turns after the first one.

    The places of their blocks do not depend on the messages, but for the last block, and for one that
    ends where the prompt of the turn before ended.
    """
    text, current, start, hashes, ends = "\0".join(texts), blocks.current, blocks.end, blocks.hashes, blocks.ends
    sample, length = text[::STEP], len(text)
    before = length - len(texts[-1]) - len(texts[-2]) - 2 if len(texts) > 2 else 0  # the previous prompt
    for place, stop in _LATER_PLACES:
        if place < before <= stop:
            hashes.append(_hash_to(before, place, current, text, sample))
            ends.append(start + before)
        if stop >= length:
            hashes.append(_hash_to(length, place, current, text, sample))
            break
        current = hash((current, sample[place // STEP : stop // STEP]))
        hashes.append(current)
        ends.append(start + stop)
    else:
        hashes.append(_hash_to(length, stop, current, text, sample))
    ends.append(start + length)
    blocks.end = start + length


def _hash_to(end: int, place: int, current: int, text: str, sample: str) -> int:
    """Return the hash of a prompt that ends in the block from `place` on."""
    tail = text[max(place, end - TAIL) : end]
    return hash((current, sample[place // STEP : (end + STEP - 1) // STEP], tail))


def _add(message: Message, blocks: _Chain) -> None:
    """Add the blocks of one message."""
    content, role = message.content, message.role
    if isinstance(content, str) and len(content) <= SHORT and message.tool_calls is None:
        blocks.add(hash((blocks.current, role, content)), blocks.end + len(content))
        return
    current, end = hash((blocks.current, role)), blocks.end
    text = message.text
    length = len(text)
    for place, stop in _PLACES:
        if stop >= length:
            current = hash((current, text[place:]))
            break
        current = hash((current, text[place:stop]))
        blocks.add(current, end + stop)
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
    for text in (message.text, *message.images):
        sample = text if len(text) <= SHORT else f"{len(text)}:{text[:SAMPLE]}:{text[-SAMPLE:]}"
        home = crc32(sample.encode(errors="surrogatepass"), home)
    return home
