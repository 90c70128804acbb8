"""Affinity: which of several servers answers a prompt first, given what its prefix cache holds.

Pure: no I/O, no clock.

A server computes only the part of a prompt that its prefix cache does not hold. The gateway cannot
look into that cache; it remembers what it has sent to each server (`prefix_cache.py`).

A server costs, in characters of text:

- what is on the way to its first token there: requests before this one, as far as their prompts
  were not cached;
- `LOAD` for each request in flight, since each slows down the others;
- `UNKNOWN` times the part of this prompt that it has to compute. This is more than 1, because that
  part also pushes something else out of the cache.

The cheapest server gets the request. So conversations stay where their cache is, a prompt that most
requests begin with spreads over as many servers as it needs, and prompts with nothing in common go
where least waits. A limit on how uneven the load may be, as consistent hashing with bounded loads
has, is not needed: it costs hits and wins no time (`make bench-affinity`).

A replica of the gateway may not know what the others have sent. So each conversation has a home, the
server that rendezvous hashing chooses by its beginning: a new one begins there as long as that costs
at most `LOAD` more than elsewhere, and a continued one that this replica has not seen is taken to be cached
there. With one replica this applies only after a restart, until everything that the server held has been
pushed out. Later such conversations are those of clients that make up answers or leave out the oldest messages.
There are other replicas if they can be reached, or if turns of known conversations were served elsewhere.
Replicas that reach each other tell what they have in flight, and which conversations are not at home
(`shared_affinity.py`).
"""

from collections import deque
from collections.abc import Sequence

from gateway.admission.prefix_cache import PrefixCache
from gateway.admission.server_slots import Placement
from gateway.chat.prompt_blocks import PromptBlocks

LOAD = 512.0
UNKNOWN = 1.5
MEMORY = 0.99
"""Weight that the share of turns served elsewhere keeps with each further turn: about the last 100 decide."""
SERVED_ELSEWHERE = 0.2
"""Share of the turns of known conversations from which on other replicas are taken to serve them too."""
_INFINITE, _LOWEST = float("inf"), -float("inf")


class Affinity:
    """The choice among the servers of one backend, and how often it kept a prompt where it was.

    Attributes:
        kept: requests that went to the server that knew most of their prompt.
        moved: requests that went elsewhere, because that server was busier or could not take them.
        new: requests of which no server knew anything.
        placed: prompts that were sent of late and the caches that they went to, for the other replicas; None
            if there are none.
    """

    def __init__(self) -> None:
        self.kept = 0
        self.moved = 0
        self.new = 0
        self.placed: deque[tuple[PromptBlocks, PrefixCache]] | None = None
        self._elsewhere = 0.0
        """Share of the turns of known conversations of which the turn before was served elsewhere."""

    def __repr__(self) -> str:
        return f"<Affinity {self.kept} kept, {self.moved} moved, {self.new} new>"

    @property
    def _has_others(self) -> bool:
        """True if other replicas send conversations to the same servers."""
        return self.placed is not None or self._elsewhere > SERVED_ELSEWHERE

    def take_counts(self) -> dict[str, int]:
        """Return the counts by outcome, and start over."""
        counts = {"kept": self.kept, "moved": self.moved, "new": self.new}
        self.kept = self.moved = self.new = 0
        return counts

    def choose(self, prompt: PromptBlocks, placements: Sequence[Placement]) -> Placement:
        """Return the placement, of those that can take the request now, where it costs least.

        Of equals, the one whose server was given a request longest ago.
        """
        prompt.counts = counts = {}
        most = 0
        for placement in placements:
            counts[placement] = count = placement.server.prefixes.known_blocks(prompt)
            if count > most:
                most = count
        is_unseen = prompt.is_continued and most <= prompt.common
        home = _home(prompt, placements) if is_unseen or not prompt.is_continued else None
        is_at_home = is_unseen and home is not None and (self._has_others or not home.server.prefixes.is_filled)
        ends, size = prompt.ends, prompt.size
        best, least, turn, home_cost = placements[0], _INFINITE, _INFINITE, _INFINITE
        for placement, count in counts.items():
            cache = placement.server.prefixes
            unknown = 0 if is_at_home and placement is home else size - ends[count - 1] if count else size
            cost = cache.pending + cache.elsewhere + LOAD * placement.limits[0].count + UNKNOWN * unknown
            if cost < least or (cost == least and cache.turn < turn):
                best, least, turn = placement, cost, cache.turn
            if placement is home:
                home_cost = cost
        return home if home is not None and home_cost <= least + LOAD else best

    def begin(self, prompt: PromptBlocks, placement: Placement, others: Sequence[Placement]) -> int:
        """Record that a request was sent. Return the characters that the server has to compute for it."""
        cache, counts = placement.server.prefixes, prompt.counts
        prompt.counts = {}
        if len(counts) == len(others):  # it was chosen among all of them, in this step
            count, most = counts[placement], max(counts.values())
        else:
            count = cache.known_blocks(prompt)
            most = max(other.server.prefixes.known_blocks(prompt) for other in others)
        if not most:
            self.new += 1
        elif count >= most:
            self.kept += 1
        else:
            self.moved += 1
        if prompt.previous and most > prompt.common:
            is_elsewhere = most <= len(prompt.hashes) + prompt.previous
            self._elsewhere = self._elsewhere * MEMORY + (1 - MEMORY) * is_elsewhere
        cache.add(prompt)
        if self.placed is not None:
            self.placed.append((prompt, cache))
        unknown = prompt.size - prompt.ends[count - 1] if count else prompt.size
        cache.pending += unknown
        return unknown


def _home(prompt: PromptBlocks, placements: Sequence[Placement]) -> Placement:
    """Return where the conversation is at home, by rendezvous hashing."""
    home, highest, number = placements[0], _LOWEST, prompt.home
    for placement in placements:
        score = hash((number, placement.server.prefixes.seed))
        if score > highest:
            home, highest = placement, score
    return home
