"""News of the other replicas about the servers of a backend, with which all replicas choose as one.

Pure: no I/O, no clock.

Each replica tells the others, in a message every `INTERVAL` while something changes:

1. What it has in flight at each server: the number of requests, and the characters before their first
   tokens. The others add this to the cost of the server.
2. Which system messages it has sent to a server (`PromptBlocks.root`). The others count these as cached there.
3. Which conversations went to a server where the others do not expect them (`PromptBlocks.home`): a new one
   that did not begin at its home, and one that moved. The others count it as cached there.

A message that is lost or late costs a less good choice. What a replica has in flight is told again every
`BEAT`, and forgotten if it was not heard for `SILENCE`.
"""

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import msgspec
from msgspec import Struct

from gateway.admission.affinity import LOAD, Affinity
from gateway.admission.prefix_cache import PrefixCache
from gateway.admission.server_slots import ServerSlots
from gateway.chat.prompt_blocks import PromptBlocks

INTERVAL = 0.05
"""Seconds between two messages of a replica."""
FEW_REPLICAS = 4
"""Other replicas up to which `INTERVAL` applies. With more, messages are rarer, so that no replica gets more."""
BEAT = 1.0
SILENCE = 3.0
REPEAT = 1.0
"""Seconds after which a system message is told again, as one that is still used."""
MOST_PLACED = 1000
"""Prompts of one backend that are told in one message."""
MOST_KEPT = 50_000
"""Conversations, and system messages, of which is remembered what was told."""


class Choosing(Protocol):
    """A backend, as this module sees it."""

    @property
    def servers(self) -> Sequence[ServerSlots]: ...

    @property
    def affinity(self) -> Affinity | None: ...


class BackendNews(Struct, frozen=True, array_like=True):
    """News about one backend. The other lists name servers by their number in `servers`."""

    servers: list[str]
    """Places."""
    loads: list[tuple[int, int, int]]
    """Servers with requests in flight: their number, and the characters before first tokens."""
    roots: list[tuple[int, int, int]]
    """Servers, the numbers of system messages, and their sizes in characters."""
    homes: list[tuple[int, int, int]]
    """Servers, the homes of conversations, and the sizes of their prompts."""


class News(Struct, frozen=True):
    """One message, by the names of backends."""

    replica: str
    backends: dict[str, BackendNews]


class SharedAffinity:
    """The news of `replica` about its `backends`, and those that the others sent. `backends` may change in place."""

    def __init__(self, replica: str, backends: Mapping[str, Choosing]) -> None:
        self._replica = replica
        self._backends = backends
        self._loads: dict[str, dict[tuple[str, str], float]] = {}
        """Costs of what other replicas have in flight, by replica, then by backend and place."""
        self._heard: dict[str, float] = {}
        """Other replicas, and when they were heard."""
        self._now = 0.0
        self._told_loads: dict[str, list[tuple[int, int, int]]] = {}
        self._told_at = 0.0
        self._told_roots: OrderedDict[tuple[str, str, int], float] = OrderedDict()
        self._expected: OrderedDict[tuple[str, int], int] = OrderedDict()
        """Seeds of the servers where conversations are expected that are not at home, by backend and home."""

    def __repr__(self) -> str:
        return f"<SharedAffinity {self._replica} and {len(self._heard)} others>"

    @property
    def interval(self) -> float:
        """Seconds until the next step."""
        return INTERVAL * max(1.0, len(self._heard) / FEW_REPLICAS)

    def step(self, now: float) -> bytes | None:
        """Return the message to send now, or None if there is nothing to tell."""
        self._now = now
        for replica in [replica for replica, heard in self._heard.items() if now - heard > SILENCE]:
            del self._heard[replica]
            self._set_loads(replica, {})
        told = {name: self._news(name, backend) for name, backend in self._backends.items() if _is_shared(backend)}
        loads = {name: news.loads for name, news in told.items() if news.loads}
        is_new = loads != self._told_loads or any(news.roots or news.homes for news in told.values())
        if not is_new and (not loads or now - self._told_at < BEAT):
            return None
        self._told_loads, self._told_at = loads, now
        return msgspec.json.encode(News(self._replica, told))

    def receive(self, message: bytes) -> None:
        """Follow a message, unless it is this replica's own or something else."""
        try:
            news = msgspec.json.decode(message, type=News)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        if news.replica == self._replica:
            return
        self._heard[news.replica] = self._now
        loads: dict[tuple[str, str], float] = {}
        for name, told in news.backends.items():
            backend = self._backends.get(name)
            for server, requests, characters in told.loads:
                if 0 <= server < len(told.servers):
                    loads[name, told.servers[server]] = LOAD * max(0, requests) + max(0, characters)
            if backend is not None and _is_shared(backend):
                self._mark(name, backend, told)
        self._set_loads(news.replica, loads)

    def go_alone(self) -> None:
        """Forget what others have in flight: they cannot be heard."""
        for replica in list(self._heard):
            del self._heard[replica]
            self._set_loads(replica, {})

    # Telling

    def _news(self, name: str, backend: Choosing) -> BackendNews:
        servers = backend.servers
        loads = [
            (number, server.slots.count, server.prefixes.pending)
            for number, server in enumerate(servers)
            if server.slots.count or server.prefixes.pending
        ]
        news = BackendNews([server.place for server in servers], loads, [], [])
        for prompt, cache in _take_placed(backend):
            self._add_prompt(name, servers, prompt, cache, news)
        return news

    def _add_prompt(
        self, name: str, servers: Sequence[ServerSlots], prompt: PromptBlocks, cache: PrefixCache, news: BackendNews
    ) -> None:
        number = next((number for number, server in enumerate(servers) if server.prefixes is cache), None)
        if number is None:
            return
        root = name, news.servers[number], prompt.root
        if prompt.common and self._now - self._told_roots.get(root, -REPEAT) >= REPEAT:
            cache.remember_root(prompt)
            _keep(self._told_roots, root, self._now)
            news.roots.append((number, prompt.root, prompt.ends[prompt.common - 1]))
        home = name, prompt.home
        expected = self._expected.get(home)
        if expected is None:
            expected = max((server.prefixes.seed for server in servers), key=lambda seed: hash((prompt.home, seed)))
        if cache.seed != expected:
            news.homes.append((number, prompt.home, prompt.size))
            self._expect(home, servers, cache.seed)

    # Following

    def _mark(self, name: str, backend: Choosing, told: BackendNews) -> None:
        by_place = {server.place: server.prefixes for server in backend.servers}
        caches = [by_place.get(place) for place in told.servers]
        for number, root, size in told.roots:
            if 0 <= number < len(caches) and (cache := caches[number]) is not None and size > 0:
                cache.mark_root(root, size)
        for number, home, size in told.homes:
            if 0 <= number < len(caches) and (cache := caches[number]) is not None and size > 0:
                self._expect((name, home), backend.servers, cache.seed)
                cache.mark(home, size)

    def _expect(self, home: tuple[str, int], servers: Sequence[ServerSlots], seed: int) -> None:
        """Expect a conversation at the server with this seed from now on, and nowhere else."""
        before = self._expected.get(home)
        if before is not None:
            for server in servers:
                if server.prefixes.seed == before:
                    server.prefixes.unmark(home[1])
        _keep(self._expected, home, seed)

    def _set_loads(self, replica: str, loads: dict[tuple[str, str], float]) -> None:
        before = self._loads.pop(replica, {})
        if loads:
            self._loads[replica] = loads
        told = before.keys() | loads.keys()  # also what has not changed: a server may be new here
        if not told:
            return
        for name, backend in self._backends.items():
            for server in backend.servers:
                if (key := (name, server.place)) in told:
                    server.prefixes.elsewhere = sum(known.get(key, 0.0) for known in self._loads.values())


def _is_shared(backend: Choosing) -> bool:
    return backend.affinity is not None


def _take_placed(backend: Choosing) -> list[tuple[PromptBlocks, PrefixCache]]:
    affinity = backend.affinity
    assert affinity is not None
    placed = affinity.placed
    if not placed:
        if placed is None:
            affinity.placed = deque(maxlen=MOST_PLACED)
        return []
    taken = list(placed)
    placed.clear()
    return taken


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def _keep(kept: OrderedDict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Put a value last, and drop the one that was put longest ago if there are too many."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > MOST_KEPT:
        kept.popitem(last=False)
