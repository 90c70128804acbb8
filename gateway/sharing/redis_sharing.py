"""What replicas share through Redis."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from gateway.admission.shared_affinity import SharedAffinity
from gateway.admission.shared_limits import SharedLimits
from gateway.api.named_keys import NamedKeys
from gateway.replicas.channel import Channel
from gateway.replicas.key_limits import SharedKeyLimits
from gateway.replicas.limit_sharing import LimitSharing, open_link
from gateway.replicas.member import HubMember
from gateway.replicas.names import replica_name
from gateway.replicas.shared_usage import SharedUsage
from gateway.sharing.affinity_sharing import AFFINITY, AffinitySharing
from gateway.sharing.base import Sharing
from gateway.sharing.hub_sharing import share_file
from gateway.state_file import StateFile
from gateway.upstream.backend import Backend
from gateway.upstream.hints import Hints
from gateway.upstream.restraints import OnEvent
from gateway.usage.recorder import UsageRecorder


class RedisSharing(Sharing):
    """Shares through the Redis at `url`. `state` and `on_count` are those of `LimitSharing`.

    `member` is the connection with other replicas on this machine, which write to the same file of usage.
    """

    def __init__(self, url: str, member: HubMember | None, state: StateFile, on_count: Callable[[int], None]) -> None:
        super().__init__()
        self._member = member
        self.link, self.document = open_link(url)
        self.limits = leased = SharedLimits()
        self._leases = LimitSharing(self.link, leased, state, on_count)
        self.add(self.link)
        self.add(self._leases)

    def share_hints(self, backends: Mapping[str, Backend], clock: Callable[[], float]) -> OnEvent | None:
        channel = Channel(self.link, "hints")
        hints = Hints(self.link.replica, backends, channel.send, clock)
        channel.listen(hints.receive)
        self.add(channel)
        return hints.tell

    def share_affinity(self, backends: Mapping[str, Backend], clock: Callable[[], float]) -> None:
        link, shared = self.link, SharedAffinity(self.link.replica, backends)
        link.subscribe(AFFINITY, shared.receive)
        link.watch(on_down=shared.go_alone)
        self.add(AffinitySharing(shared, partial(link.publish, AFFINITY), clock))

    def share_usage(self, usage: UsageRecorder, days: int) -> None:
        usage.others = shared = SharedUsage(self.link, usage, days)
        self.add(shared)
        if self._member is not None:
            share_file(self._member, usage)

    def share_keys(self, keys: NamedKeys) -> None:
        keys.replica = name = replica_name(self.link.replica)
        replicas = self._leases.replicas
        self.add(SharedKeyLimits(self.link, keys.accounts, name, predecessor=keys.predecessor, replicas=replicas))

    def view(self) -> dict[str, Any] | None:
        return self._leases.view()

    def begin_leaving(self) -> None:
        self._leases.begin_leaving()
