"""What the replicas of one machine share through the process that started them."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial

from gateway.admission.hub_limits import HubLimits
from gateway.admission.shared_affinity import SharedAffinity
from gateway.api.named_keys import NamedKeys
from gateway.replicas.key_limits import SharedKeyLimits
from gateway.replicas.member import HubLink, HubMember
from gateway.replicas.names import replica_name
from gateway.sharing.affinity_sharing import AFFINITY, AffinitySharing
from gateway.sharing.base import Sharing
from gateway.upstream.backend import Backend
from gateway.usage.recorder import UsageRecorder

ROLLOUT = "rollout"
"""Name of the document with the roll-out."""
USAGE = "usage"
"""Subject of the question that has other replicas write their usage."""


class HubSharing(Sharing):
    """Shares through the parent, at the other end of `member`."""

    def __init__(self, member: HubMember) -> None:
        super().__init__()
        self._member = member
        self.document = member.document(ROLLOUT)
        self.limits = HubLimits(member, member.hello.replicas, asyncio.get_running_loop().call_later)
        member.slot_holder = self.limits

    def share_affinity(self, backends: Mapping[str, Backend], clock: Callable[[], float]) -> None:
        member, shared = self._member, SharedAffinity(self._member.hello.name, backends)

        async def send(message: bytes) -> None:
            member.tell(AFFINITY, message)

        member.on_told[AFFINITY] = lambda _, message: shared.receive(message)
        self.add(AffinitySharing(shared, send, clock))

    def share_usage(self, usage: UsageRecorder, days: int) -> None:
        share_file(self._member, usage)

    def share_keys(self, keys: NamedKeys) -> None:
        link = HubLink(self._member)
        keys.replica = name = replica_name(link.replica)
        self.add(SharedKeyLimits(link, keys.accounts, name, predecessor=keys.predecessor))


def share_file(member: HubMember, usage: UsageRecorder) -> None:
    """Have all replicas of a machine write to their file of usage before one of them reads it."""

    async def flush(argument: object) -> None:
        await usage.flush()

    member.respond[USAGE] = flush
    usage.flush_others = partial(member.ask, USAGE)
