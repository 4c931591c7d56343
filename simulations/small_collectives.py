"""Two-phase collectives in small, as simulated processes run them: begin, prepare, commit; or give up.

Each process has several streams of them: among all members, some of which may not be repeated, and between two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Final

from simulations.network import Counts, Network
from sparkle_mesh import limits
from sparkle_mesh.membership.messages import OperationList, OperationState
from sparkle_mesh.membership.operations import SEQUENCE_BITS, OpenOperations, is_routed
from sparkle_mesh.membership.view import Member, View
from sparkle_mesh.membership.view_change import ViewChange

#: Among all: this one's collectives are repeated after a loss, and some of the other's are not.
REPEATED: Final = 0
ONCE: Final = 1
#: By epoch, where numbers begin anew in each (else -1), and number.
Key = tuple[int, int]


@dataclass(slots=True)
class Exercised(Counts):
    """How often a run met each situation."""

    crashes: int = 0
    proposer_deaths: int = 0
    in_doubt: int = 0
    partitions: int = 0
    sleeps: int = 0
    wrong_suspicions: int = 0
    joins: int = 0
    disks_lost: int = 0
    settled_elsewhere: int = 0
    leaves: int = 0
    cancels: int = 0
    renewals: int = 0
    garbled: int = 0
    views: int = 0
    excluded: int = 0
    quorum_losses: int = 0
    committed: int = 0
    committed_by_two: int = 0
    aborted: int = 0
    lost: int = 0
    committed_by_view: int = 0
    refused_for_room: int = 0


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process has ended an operation, and who else was to end it so."""

    how: str
    digest: bytes
    members: tuple[Member, ...] = field(compare=False, default=())


@dataclass(slots=True)
class Heard:
    """What others have said of an operation that is open here."""

    begun: set[Member] = field(default_factory=set)
    prepared: dict[Member, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Process:
    """One life of one simulated process. Without a machine it is a candidate that no view has taken in yet."""

    member: Member
    index: int
    #: What its clock shows at the beginning, and how many of its seconds pass in one.
    clock: tuple[float, float] = (0.0, 1.0)
    alive: bool = True
    asleep: bool = False
    machine: ViewChange | None = None
    operations: OpenOperations = field(default_factory=OpenOperations)
    #: By stream, the number that it has come to.
    at: dict[int, int] = field(default_factory=dict)
    heard: dict[int, Heard] = field(default_factory=dict)
    ahead: dict[tuple[int, int], list[tuple[Member, str, bytes]]] = field(default_factory=dict)
    ended: dict[Key, Ending] = field(default_factory=dict)
    #: What ended before this process came to it.
    settled: dict[int, Ending] = field(default_factory=dict)
    #: In which epoch it has last committed something, by stream.
    worked_in: dict[int, int] = field(default_factory=dict)
    #: What was open when the epoch before ended.
    before: dict[int, OperationState] = field(default_factory=dict)
    views: dict[int, tuple[View, OperationList]] = field(default_factory=dict)
    excluded: bool = False
    lost_quorum: bool = False
    inbox: list[Callable[[], None]] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether it does anything at all."""
        return self.alive and not self.excluded

    @property
    def view(self) -> View:
        assert self.machine is not None
        return self.machine.view


def stream_of_two(one: int, other: int) -> int:
    """Return the stream of the operations between these ranks."""
    return limits.COLLECTIVE_STREAM_NUMBERS_COUNT + one * limits.MESH_MEMBERS_MAX_COUNT + other


def key_of(number: int, epoch: int) -> Key:
    """Return under what an operation is known for good."""
    return (epoch if is_routed(number >> SEQUENCE_BITS) else -1, number)


def route_of(number: int) -> tuple[int, ...]:
    """Return the ranks that take part; none if all do."""
    stream = (number >> SEQUENCE_BITS) - limits.COLLECTIVE_STREAM_NUMBERS_COUNT
    return divmod(stream, limits.MESH_MEMBERS_MAX_COUNT) if stream >= 0 else ()


def is_once(number: int) -> bool:
    """Whether it is not repeated: two of three in one of the streams."""
    return number >> SEQUENCE_BITS == ONCE and number % 3 != 0


def members_in(view: View, number: int) -> tuple[Member, ...]:
    """Return who takes part."""
    route = route_of(number)
    return tuple(view.members[rank] for rank in route) if route else view.members


class SmallCollectives(Network, ABC):
    """A world whose processes do one collective after the other in each stream, in whatever view they are."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.exercised = Exercised()
        self.processes: dict[Member, Process] = {}
        self.compute_s = self.random.choice([0.01, 0.1, 1.0])
        self.streams = self.random.choice([(REPEATED,), (REPEATED,), (REPEATED, ONCE)])
        self.in_flight = self.random.choice([1, 1, 3])
        self.pairs = self.random.random() < 0.2

    @abstractmethod
    def schedule_tick(self, process: Process) -> None:
        """Let the machine do what is due, when it is."""

    def begin_all(self, process: Process) -> None:
        """Begin again what is to be repeated, and with what comes next in every stream."""
        epoch = process.view.epoch
        for stream in self.streams:
            for number in self._repeated(process, stream):
                self.after(self.compute_s, partial(self.begin, process, epoch, number))
            self.proceed(process, stream)
        rank = process.view.rank_of(process.member)
        if self.pairs and rank is not None and rank - rank % 2 + 1 < process.view.size:
            self.proceed(process, stream_of_two(rank - rank % 2, rank - rank % 2 + 1))

    def _repeated(self, process: Process, stream: int) -> list[int]:
        """Return what is begun, which it is from the beginning of an epoch if it is repeated."""
        return [
            state.number
            for state in process.operations.standing().operations
            if state.state == "begun" and state.number >> SEQUENCE_BITS == stream
        ]

    def proceed(self, process: Process, stream: int) -> None:
        """Begin the next collective of ``stream`` after a while, if not too many are in flight."""
        self.after(self.compute_s, partial(self._proceed, process, process.view.epoch, stream))

    def _proceed(self, process: Process, epoch: int, stream: int) -> None:
        if process.machine is None or not process.runs or process.view.epoch != epoch:
            return
        if any(number not in process.heard for number in self._repeated(process, stream)):
            self.proceed(process, stream)
        elif sum(number >> SEQUENCE_BITS == stream for number in process.heard) < self.in_flight:
            self.begin(process, epoch, process.at.get(stream, stream << SEQUENCE_BITS) + 1)

    def begin(self, process: Process, epoch: int, number: int) -> None:
        machine = process.machine
        if machine is None or not process.runs or machine.view.epoch != epoch or machine.excluded:
            return
        if process.asleep:
            process.inbox.append(partial(self.begin, process, epoch, number))
            return
        stream = number >> SEQUENCE_BITS
        if number in process.heard:
            return
        if any(before < number and before not in process.heard for before in self._repeated(process, stream)):
            # What is repeated begins in its order.
            self.after(self.compute_s, partial(self.begin, process, epoch, number))
            return
        while number in process.settled:
            process.ended[key_of(number, epoch)] = process.settled.pop(number)
            process.at[stream] = number
            number += 1
        if key_of(number, epoch) in process.ended:
            return
        if not process.operations.begin(number, route=route_of(number), once=is_once(number)):
            if not process.operations.frozen:
                self.exercised.refused_for_room += 1
                self.schedule_tick(process)
                self.after(self.compute_s, partial(self.begin, process, epoch, number))
            return
        process.at[stream] = max(number, process.at.get(stream, 0))
        process.heard[number] = Heard({process.member})
        self.say(process, number, "begin", b"")
        for sender, word, digest in process.ahead.pop((epoch, number), []):
            self._hear(process, sender, epoch, number, word, digest)
        self._look(process, number)
        self.proceed(process, stream)

    def say(self, process: Process, number: int, word: str, digest: bytes) -> None:
        for member in members_in(process.view, number):
            if member != process.member:
                arrive = partial(self._arrived, member, process.member, process.view, number, word, digest)
                self.transmit(process.member, member, arrive)

    def _arrived(self, receiver: Member, sender: Member, view: View, number: int, word: str, digest: bytes) -> None:
        process = self.processes[receiver]
        if not process.runs:
            return
        if process.asleep:
            process.inbox.append(partial(self._arrived, receiver, sender, view, number, word, digest))
            return
        self._hear(process, sender, view.epoch, number, word, digest)
        self._look(process, number)

    def _hear(self, process: Process, sender: Member, epoch: int, number: int, word: str, digest: bytes) -> None:
        machine = process.machine
        now_in = -1 if machine is None else machine.view.epoch
        heard = process.heard.get(number)
        ended = key_of(number, epoch) in process.ended
        if epoch > now_in or (epoch == now_in and heard is None and not ended):
            process.ahead.setdefault((epoch, number), []).append((sender, word, digest))
            return
        if epoch != now_in or heard is None or ended:
            return
        match word:
            case "begin":
                heard.begun.add(sender)
            case "prepared":
                heard.begun.add(sender)
                heard.prepared[sender] = digest
            case _:
                # Who has aborted had not prepared, and never will: nobody can have committed.
                if process.operations.abort(number, told=True):
                    self.end(process, number, "aborted", b"")
                    self.proceed(process, number >> SEQUENCE_BITS)

    def _look(self, process: Process, number: int) -> None:
        """See whether the next stage of the collective is reached."""
        machine, heard = process.machine, process.heard.get(number)
        state = process.operations.state(number)
        if machine is None or heard is None or state is None or process.asleep:
            return
        epoch = machine.view.epoch
        if key_of(number, epoch) in process.ended:
            return
        everybody = set(members_in(machine.view, number))
        if state.state == "begun" and heard.begun >= everybody:
            self.after(self.compute_s / 10, partial(self._prepare, process, epoch, number))
        elif state.state == "prepared" and heard.prepared.keys() >= everybody:
            if len(set(heard.prepared.values())) > 1:
                raise self.broken("digests of one operation differ")
            if process.operations.commit(number):
                self.end(process, number, "committed", state.digest)
                self.proceed(process, number >> SEQUENCE_BITS)

    def _prepare(self, process: Process, epoch: int, number: int) -> None:
        machine = process.machine
        if not process.runs or machine is None or machine.view.epoch != epoch:
            return
        if process.asleep:
            process.inbox.append(partial(self._prepare, process, epoch, number))
            return
        state = process.operations.state(number)
        if state is not None and state.state != "begun":
            return
        members = members_in(machine.view, number)
        digest = sha256(repr((epoch, number, members)).encode()).digest()[:16]
        if process.operations.prepare(number, digest):
            process.heard[number].prepared[process.member] = digest
            self.say(process, number, "prepared", digest)
            self._look(process, number)

    def end(self, process: Process, number: int, how: str, digest: bytes) -> None:
        self.end_in(process, process.view, number, how, digest)

    def end_in(self, process: Process, view: View, number: int, how: str, digest: bytes, *, epoch: int = -1) -> None:
        """It has ended so for ``process``, and is to end so for all members of ``view``; in ``epoch``, or that now."""
        key = key_of(number, view.epoch if epoch < 0 else epoch)
        members = view.members if epoch >= 0 else members_in(view, number)
        process.ended[key] = Ending(how, digest, members)
        process.heard.pop(number, None)
        self.exercised.committed += how == "committed"
        self.exercised.committed_by_two += how == "committed" and key[0] >= 0
        self.exercised.aborted += how == "aborted"
        self.exercised.lost += how == "lost"
        if how == "committed" and process.machine is not None:
            process.worked_in[number >> SEQUENCE_BITS] = process.machine.view.epoch
        for other in self.processes.values():
            self.compare(key, process, other)

    def compare(self, key: Key, one: Process, other: Process) -> None:
        """No two have ended an operation differently: but who gave up by itself and went on in no further view."""
        mine, theirs = one.ended.get(key), other.ended.get(key)
        if mine is None or theirs is None:
            return
        # Who comes later learns only that it was committed.
        if mine.how == theirs.how and (mine.digest == theirs.digest or not (mine.digest and theirs.digest)):
            return
        for aborted, elsewise, process in ((mine, theirs, one), (theirs, mine, other)):
            gave_up = aborted.how == "aborted" and elsewise.how in ("committed", "lost")
            if gave_up and process.member not in elsewise.members:
                return
        raise self.broken(
            f"operation {key}: {mine.how} at {one.member.peer_id}, {theirs.how} at {other.member.peer_id}"
        )

    def cancel(self, process: Process) -> None:
        """Its caller gives a collective up: allowed until it has prepared."""
        if process.machine is None or process.asleep or not process.heard:
            return
        number = self.random.choice(list(process.heard))
        if process.operations.abort(number):
            self.exercised.cancels += 1
            self.end(process, number, "aborted", b"")
            self.say(process, number, "abort", b"")
            self.proceed(process, number >> SEQUENCE_BITS)
