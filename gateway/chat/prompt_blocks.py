"""The prompt of a chat as a chain of hashed blocks, by which prompts with a common beginning are known. Pure.

An engine's prefix cache keeps what it has computed for the beginning of a prompt, so two prompts
share cached work exactly as far as they are the same from the start (vLLM,
`v1/core/kv_cache_utils.py`, hashes blocks of tokens in the same way). The gateway has no tokenizer:
its blocks are pieces of text, and each message begins a new one.
"""

from itertools import chain, pairwise
from zlib import crc32

from gateway.chat.request import Chat, Message

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

# A block has the same place in every text that begins in the same way, so places may depend on
# nothing but the distance from the beginning. Blocks far from it are longer.
_PLACES = [
    *pairwise(
        chain(range(0, 16 * 1024, SHORT), range(16 * 1024, 128 * 1024, 4096), range(128 * 1024, 1 << 24, 64 * 1024))
    )
]


class PromptBlocks:
    """Blocks of one prompt.

    Attributes:
        hashes: a hash for each block and everything before it; only valid in this process.
        ends: number of characters up to the end of each block.
        common: number of blocks of the tools and the system message, which many conversations share.
        home: number that all turns of the conversation have in common, in every process.
        is_continued: whether the conversation has an answer of the model already.
    """

    __slots__ = ("common", "ends", "hashes", "home", "is_continued")

    def __init__(self, hashes: list[int], ends: list[int], common: int, home: int, is_continued: bool) -> None:
        self.hashes = hashes
        self.ends = ends
        self.common = common
        self.home = home
        self.is_continued = is_continued

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


def prompt_blocks(chat: Chat, model: str) -> PromptBlocks | None:
    """Return the blocks of `chat` for `model`, or None if it is not worth caching."""
    hashes: list[int] = []
    ends: list[int] = []
    current, end = hash(model), 0
    if chat.tools:
        for tool in chat.tools:
            function = tool.function
            current = hash((current, function.name, function.description))
            end += len(function.name) + len(function.description or "")
        hashes.append(current)
        ends.append(end)
    common, home, is_beginning, is_continued = len(hashes), 0, True, False
    for message in chat.messages:
        content, role = message.content, message.role
        if len(hashes) < MAX_BLOCKS:
            if isinstance(content, str) and len(content) <= SHORT and message.tool_calls is None:
                current = hash((current, role, content))
                end += len(content)
                hashes.append(current)
                ends.append(end)
            else:
                current, end = _add(message, hash((current, role)), end, hashes, ends)
        if is_beginning and role != "assistant":
            home = _sampled(home, message)
            if role == "user":
                is_beginning = False
            else:
                common = len(hashes)
        elif role == "assistant":
            is_continued = True
    if end < WORTH_CACHING:
        return None
    return PromptBlocks(hashes, ends, common, home, is_continued)


def _add(message: Message, current: int, end: int, hashes: list[int], ends: list[int]) -> tuple[int, int]:
    """Add the blocks of a message to `hashes` and `ends`. Return the last of each."""
    text = message.text
    length = len(text)
    for place, stop in _PLACES:
        if stop >= length:
            current = hash((current, text[place:]))
            break
        current = hash((current, text[place:stop]))
        hashes.append(current)
        ends.append(end + stop)
    end += length
    for call in message.tool_calls or ():
        current = hash((current, call.function.name, call.function.arguments))
        end += len(call.function.arguments)
    for url in message.images:
        current = hash((current, len(url), url[:SAMPLE], url[-SAMPLE:]))
        end += IMAGE_CHARACTERS
    hashes.append(current)
    ends.append(end)
    return current, end


def _sampled(home: int, message: Message) -> int:
    """Return `home` continued with a message, of which both ends stand for the whole."""
    for text in (message.text, *message.images):
        sample = text if len(text) <= SHORT else f"{len(text)}:{text[:SAMPLE]}:{text[-SAMPLE:]}"
        home = crc32(sample.encode(errors="surrogatepass"), home)
    return home
