"""Estimate of what the prefix cache of one server holds: what it was sent, but for the oldest.

Other replicas of the gateway send prompts as well. Of what they sent, this one knows only marks: the numbers
of system messages and of conversations (`shared_affinity.py`).

Pure: no I/O, no clock.
"""

from collections import OrderedDict

from gateway.chat.prompt_blocks import PromptBlocks

CHARACTERS_PER_TOKEN = 4
"""Characters in a token until the server has counted those of a prompt."""
LEAST_CHARACTERS_PER_TOKEN, MOST_CHARACTERS_PER_TOKEN = 0.5, 16.0
MEMORY = 0.98
"""Weight that a counted prompt keeps with each further one: about the last 50 decide."""
FIRST_TOKENS = 1000.0
"""Tokens that `CHARACTERS_PER_TOKEN` weighs as much as."""
DEFAULT_CAPACITY = 256 * 1024
"""Tokens in a prefix cache, where the server does not report it."""
MAX_KNOWN = 100_000
"""Blocks that are remembered for a server."""

MAX_ROOTS = 200
"""Roots of which the blocks are remembered."""


class PrefixCache:
    """Estimate of the prompts that the prefix cache of one server holds.

    Attributes:
        capacity: characters that it holds. A server tells its size in tokens; how many characters these are
            depends on its tokenizer and on the language, and follows from the prompts that it has counted.
        is_filled: whether the server holds nothing that was sent before the gateway began, because so much was sent
            since, or because it has restarted.
        is_sized: whether the server was asked for the size.
        pending: characters that requests there have to compute before their first token.
        elsewhere: cost of the requests that other replicas have there (`affinity.py`).
        turn: number of the last request that was sent there, among all of the backend.
        seed: number by which rendezvous hashing knows the server.
    """

    __slots__ = (
        "_counted_characters",
        "_counted_tokens",
        "_known",
        "_roots",
        "_size",
        "_tokens",
        "capacity",
        "elsewhere",
        "is_filled",
        "is_sized",
        "pending",
        "seed",
        "turn",
    )

    def __init__(self, seed: int = 0, tokens: int = DEFAULT_CAPACITY) -> None:
        self.seed = seed
        self.is_filled = False
        self.is_sized = False
        self._tokens = tokens
        self._counted_characters, self._counted_tokens = FIRST_TOKENS * CHARACTERS_PER_TOKEN, FIRST_TOKENS
        self.capacity = tokens * CHARACTERS_PER_TOKEN
        self.pending = 0
        self.elsewhere = 0.0
        self.turn = 0
        self._known: OrderedDict[int, int] = OrderedDict()
        self._size = 0
        self._roots: dict[int, PromptBlocks] = {}

    def __repr__(self) -> str:
        return (
            f"<PrefixCache {len(self._known)} blocks, {self._size}/{self.capacity} characters, {self.pending} pending>"
        )

    def resize(self, tokens: int) -> None:
        """Set the capacity, in tokens."""
        self._tokens = tokens
        self._convert()
        self._evict()

    def learn(self, characters: int, tokens: int) -> None:
        """Record how many tokens the server counted for a prompt."""
        self._counted_characters = self._counted_characters * MEMORY + characters
        self._counted_tokens = self._counted_tokens * MEMORY + tokens
        self._convert()

    def _convert(self) -> None:
        ratio = self._counted_characters / self._counted_tokens
        self.capacity = int(self._tokens * min(max(ratio, LEAST_CHARACTERS_PER_TOKEN), MOST_CHARACTERS_PER_TOKEN))

    def clear(self) -> None:
        """Forget everything: the server has restarted."""
        self._known.clear()
        self._roots.clear()
        self._size = 0
        self.is_filled = True

    def known_blocks(self, prompt: PromptBlocks) -> int:
        """Return the number of blocks at the beginning of `prompt` that the server has.

        Later blocks are forgotten first, so this is found by bisection, after the likely answers: all, all but
        the last, and those of the system message.
        """
        known, hashes = self._known, prompt.hashes
        count = len(hashes)
        if hashes[-1] in known:
            return count
        if count > 1 and hashes[-2] in known:
            return count - 1
        low, common = 0, prompt.common
        if hashes[0] in known:
            low, high = 1, count - 2
            if common and hashes[common - 1] in known:
                low, high = common, high if hashes[common] in known else common
            while low < high:
                middle = (low + high) // 2
                if hashes[middle] in known:
                    low = middle + 1
                else:
                    high = middle
        if prompt.is_continued and prompt.home in known:
            return max(low, len(hashes) - 1)
        if low < common and prompt.root in known:
            return common
        return low

    def add(self, prompt: PromptBlocks) -> None:
        """Record that `prompt` was sent to the server.

        The first block counts as used last, so that a prompt is forgotten from its end.

        A block that follows a passing one for the first time takes over its characters. Otherwise they would be
        forgotten with the passing block, which is not used again, while the conversation that has them is.
        """
        known, hashes, index = self._known, prompt.hashes, len(prompt.hashes)
        first_new = index
        for block in reversed(hashes):
            index -= 1
            if block in known:
                known.move_to_end(block)
            else:
                known[block] = size = prompt.ends[index] - (prompt.ends[index - 1] if index else 0)
                self._size += size
                first_new = index
        for index in prompt.passing:
            if index + len(hashes) + 1 >= first_new:
                known[hashes[index + 1]] += known[hashes[index]]
                known[hashes[index]] = 0
        if self._size > self.capacity or len(known) > MAX_KNOWN:
            self._evict()

    def remember_root(self, prompt: PromptBlocks) -> None:
        """Remember which blocks the root of `prompt` stands for. The server has them from this replica."""
        self.unmark(prompt.root)
        self._roots.pop(prompt.root, None)
        self._roots[prompt.root] = prompt
        if len(self._roots) > MAX_ROOTS:
            del self._roots[next(iter(self._roots))]

    def mark_root(self, root: int, size: int) -> None:
        """Record that another replica sent a prompt with this `root`, of `size` characters, to the server."""
        prompt = self._roots.get(root)
        if prompt is not None and prompt.hashes[prompt.common - 1] in self._known:
            for block in reversed(prompt.hashes[: prompt.common]):  # used last, as in `add`
                if block in self._known:
                    self._known.move_to_end(block)
        else:
            self.mark(root, size)

    def mark(self, number: int, size: int) -> None:
        """Record that another replica sent the beginning with this number, of `size` characters, to the server.

        If `number` is the `home` of a conversation, all of it but the last block counts as known.
        """
        self.unmark(number)
        self._known[number] = size
        self._size += size
        if self._size > self.capacity or len(self._known) > MAX_KNOWN:
            self._evict()

    def unmark(self, number: int) -> None:
        """Forget a mark: the conversation goes on elsewhere, or this replica knows its blocks."""
        self._size -= self._known.pop(number, 0)

    def forget_end(self, prompt: PromptBlocks, characters: int) -> None:
        """Forget the last `characters` of a prompt: the server did not compute them."""
        known, hashes, ends, start = self._known, prompt.hashes, prompt.ends, prompt.size - characters
        for index in range(len(ends) - 1, -1, -1):
            begin = ends[index - 1] if index else 0
            if begin < start:
                break
            size = known.pop(hashes[index], 0)
            self._size -= size
            taken_over = size - (ends[index] - begin)
            if taken_over > 0 and index and hashes[index - 1] in known:
                known[hashes[index - 1]] += taken_over
                self._size += taken_over

    def _evict(self) -> None:
        known = self._known
        while known and (self._size > self.capacity or len(known) > MAX_KNOWN):
            self._size -= known.popitem(last=False)[1]
            self.is_filled = True
