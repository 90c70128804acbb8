"""The part of the roll-out that replicas share, and how the states of two replicas are merged. Pure.

Theory of operation. Each tier has a register with its assignment and the stamp of the order that set
it. Merging keeps the newer of two registers (a last-writer-wins register: Shapiro et al., "A
comprehensive study of convergent and commutative replicated data types", INRIA RR-7506, 3.2.1), so
replicas that have seen the same orders agree, in whichever sequence they have seen them.

A stamp is a number and the name of the replica that took the order. The number is the time of the
order in milliseconds, by the clock of the store; a replica raises it above every number that it has
seen (a hybrid logical clock: Kulkarni et al., 2014). So an order that was given in knowledge of
another one is always the newer, whatever the clocks say, and of two orders given in ignorance of each
other the later one is.

Replicas may have different tiers. `others` is a register for the tiers that the replica with the
order did not know: the last order for all tiers applies to them as well.

The log has the orders themselves. A replica adds to an order the tiers that only it has.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from gateway.rollout.assignment import Assignment, Canary, Change, Move

FORMAT = 1
LOG = 100
"""Orders that the log keeps. Those without an effect are not shown, so it keeps more than the history."""

Stamp = tuple[int, str]
"""Number of an order, and the replica that took it."""
Number = Annotated[int, Meta(ge=1, le=2**53)]


class Register(Struct, frozen=True, omit_defaults=True):
    """Assignment of one tier, and the order that set it."""

    number: Number
    replica: str
    assignment: Assignment

    @property
    def stamp(self) -> Stamp:
        return self.number, self.replica


class OthersRegister(Struct, frozen=True, omit_defaults=True):
    """Last order for all tiers, for those that the replica with the order did not know.

    Without `backend`, a tier stays on its backend. With `is_void`, nothing is known of them: the last
    order for all tiers was undone.
    """

    number: Number
    replica: str
    backend: str | None = None
    canary: Canary | None = None
    is_rollback: bool = False
    is_void: bool = False

    @property
    def stamp(self) -> Stamp:
        return self.number, self.replica


class SharedState(Struct, frozen=True, omit_defaults=True):
    """The whole state that replicas share. `log` is sorted by stamp."""

    tiers: dict[str, Register] = {}
    others: OthersRegister | None = None
    log: list[Change] = []

    @property
    def is_empty(self) -> bool:
        return not (self.tiers or self.others or self.log)

    @property
    def last_number(self) -> int:
        """Largest number of an order; 0 without one."""
        numbers = [register.number for register in self.tiers.values()]
        numbers += [change.number for change in self.log]
        return max([*numbers, self.others.number if self.others else 0])


class _Document(Struct, frozen=True):
    """State as it is stored."""

    llm_gateway_rollout: int
    state: SharedState


class _Mark(Struct, frozen=True):
    llm_gateway_rollout: int


class OtherFormat(Exception):
    """The stored state was written by another version of the gateway, and must not be replaced."""


def encode(state: SharedState) -> bytes:
    return msgspec.json.encode(_Document(FORMAT, state), order="deterministic")


def decode(content: bytes) -> SharedState | None:
    """Return the state in `content`; None if it is not one.

    Raises:
        OtherFormat: Another version of the gateway wrote it.
    """
    try:
        if msgspec.json.decode(content, type=_Mark).llm_gateway_rollout != FORMAT:
            raise OtherFormat
        found = msgspec.json.decode(content, type=_Document).state
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if all(change.number and change.replica for change in found.log) else None


def merge(one: SharedState, other: SharedState) -> SharedState:
    """Return what both states together say. The sequence of arguments and of merges does not matter."""
    tiers = dict(one.tiers)
    for name, register in other.tiers.items():
        tiers[name] = _newer(tiers[name], register) if name in tiers else register
    others = _newer(one.others, other.others) if one.others and other.others else one.others or other.others
    log = {change.stamp: change for change in one.log}
    for change in other.log:
        known = log.get(change.stamp)
        log[change.stamp] = change if known is None or known == change else _joined(known, change)
    return SharedState(tiers, others, sorted(log.values(), key=_stamp)[-LOG:])


def visible(log: Iterable[Change]) -> list[Change]:
    """Return the orders of a log as one history: each begins where the one before it ended.

    Replicas that do not know of each other's orders record from where they moved a tier as they see
    it. An order that turns out to have had no effect is left out, such as a second guard's.
    """
    last: dict[str, Assignment] = {}
    history = []
    for change in log:
        moves = {name: Move(last.get(name, move.before), move.after) for name, move in change.tiers.items()}
        last |= {name: move.after for name, move in moves.items()}
        effective = {name: move for name, move in moves.items() if move.before != move.after}
        if effective:
            history.append(change if effective == change.tiers else replace(change, tiers=effective))
    return history


_Register = TypeVar("_Register", Register, OthersRegister)


def _newer(one: _Register, other: _Register) -> _Register:
    """Return the newer of two registers; of two with one stamp, the same one whatever their sequence."""
    return max(one, other, key=lambda register: (register.stamp, _bytes(register)))


def _joined(one: Change, other: Change) -> Change:
    """Return one order of which replicas know different tiers."""
    first, second = sorted((one, other), key=_bytes)
    return replace(second, tiers=_joined_moves(first.tiers, second.tiers))


def _joined_moves(one: Mapping[str, Move], other: Mapping[str, Move]) -> dict[str, Move]:
    both = {name: max(one[name], other[name], key=_bytes) for name in one.keys() & other.keys()}
    return {**one, **other, **both}


def _bytes(value: Any) -> bytes:
    return msgspec.json.encode(value, order="deterministic")


def _stamp(change: Change) -> Stamp:
    return change.stamp
