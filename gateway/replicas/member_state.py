"""State file of a replica: the parent, which alone writes the file, gets its sections."""

from typing import Any

from gateway.replicas.member import HubMember
from gateway.state_file import StateFile


class MemberState(StateFile):
    """Sections of the state file as they were when the replica started, or it put them itself."""

    def __init__(self, member: HubMember) -> None:
        super().__init__(None)
        self._member = member
        self._sections = dict(member.hello.sections)

    def put(self, section: str, value: Any) -> None:
        """Keep `value` in `section`; the parent writes it soon."""
        if self._sections.get(section) != value:
            self._sections[section] = value
            self._member.put(section, value)

    async def persisted(self) -> bool:
        """Wait for the parent's write, then return whether all values put so far are on disk."""
        return await self._member.persisted()
