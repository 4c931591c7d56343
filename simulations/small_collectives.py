"""Two-phase collectives in small, as simulated processes run them: begin, prepare, commit; or give up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256

from simulations.network import Counts, Network
from sparkle_mesh.membership.messages import OperationList, OperationState
from sparkle_mesh.membership.operations import OpenOperations
from sparkle_mesh.membership.view import Member, View
from sparkle_mesh.membership.view_change import ViewChange

STEPS_MAX_COUNT = 10_000


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
    leaves: int = 0
    cancels: int = 0
    views: int = 0
    excluded: int = 0
    quorum_losses: int = 0
    committed: int = 0
    aborted: int = 0
    committed_by_view: int = 0


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process has ended an operation, and who else was to end it so."""

    how: str
    digest: bytes
    members: tuple[Member, ...] = field(compare=False, default=())


@dataclass(slots=True)
class Process:
    """One life of one simulated process. Without a machine it is a candidate that no view has taken in yet."""

    member: Member
    index: int
    alive: bool = True
    asleep: bool = False
    machine: ViewChange | None = None
    operations: OpenOperations = field(default_factory=OpenOperations)
    number: int = 0
    begun: set[Member] = field(default_factory=set)
    prepared: dict[Member, bytes] = field(default_factory=dict)
    ahead: dict[tuple[int, int], list[tuple[Member, str, bytes]]] = field(default_factory=dict)
    ended: dict[int, Ending] = field(default_factory=dict)
    #: What ended before this process came to it.
    settled: dict[int, Ending] = field(default_factory=dict)
    #: In which epoch it has last committed something.
    worked_in: int = -1
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


class SmallCollectives(Network):
    """A world whose processes do one collective after the other, in whatever view they are."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.exercised = Exercised()
        self.processes: dict[Member, Process] = {}
        self.compute_s = self.random.choice([0.01, 0.1, 1.0])

    def begin(self, process: Process, epoch: int, number: int) -> None:
        machine = process.machine
        if machine is None or not process.runs or machine.view.epoch != epoch or machine.excluded:
            return
        if process.asleep:
            process.inbox.append(partial(self.begin, process, epoch, number))
            return
        if number > STEPS_MAX_COUNT or number in process.ended or process.operations.frozen:
            return
        while number in process.settled:
            process.ended[number] = process.settled.pop(number)
            number += 1
        if not process.operations.begin(number):
            return
        process.number = number
        process.begun, process.prepared = {process.member}, {}
        self.say(process, "begin", b"")
        for sender, word, digest in process.ahead.pop((epoch, number), []):
            self._hear(process, sender, epoch, number, word, digest)
        self._look(process)

    def say(self, process: Process, word: str, digest: bytes) -> None:
        assert process.machine is not None
        view, number = process.machine.view, process.number
        for member in view.members:
            if member != process.member:
                self.transmit(
                    process.member, member, partial(self._heard, member, process.member, view, number, word, digest)
                )

    def _heard(self, receiver: Member, sender: Member, view: View, number: int, word: str, digest: bytes) -> None:
        process = self.processes[receiver]
        if not process.runs:
            return
        if process.asleep:
            process.inbox.append(partial(self._heard, receiver, sender, view, number, word, digest))
            return
        self._hear(process, sender, view.epoch, number, word, digest)
        self._look(process)

    def _hear(self, process: Process, sender: Member, epoch: int, number: int, word: str, digest: bytes) -> None:
        machine = process.machine
        now_at = (-1, 0) if machine is None else (machine.view.epoch, process.number)
        if (epoch, number) > now_at:
            process.ahead.setdefault((epoch, number), []).append((sender, word, digest))
            return
        if (epoch, number) != now_at or machine is None or number in process.ended:
            return
        match word:
            case "begin":
                process.begun.add(sender)
            case "prepared":
                process.begun.add(sender)
                process.prepared[sender] = digest
            case _:
                # Who has aborted had not prepared, and never will: nobody can have committed.
                if process.operations.abort(number, told=True):
                    self.end(process, "aborted", b"")
                    self.next(process)

    def _look(self, process: Process) -> None:
        """See whether the next stage of the collective is reached."""
        machine = process.machine
        if machine is None or process.asleep or process.number in process.ended:
            return
        everybody = set(machine.view.members)
        state = process.operations.state(process.number)
        if state is None:
            return
        if state.state == "begun" and process.begun >= everybody:
            self.after(self.compute_s / 10, partial(self._prepare, process, machine.view.epoch, process.number))
        elif state.state == "prepared" and process.prepared.keys() >= everybody:
            if len(set(process.prepared.values())) > 1:
                raise self.broken("digests of one operation differ")
            if process.operations.commit(process.number):
                self.end(process, "committed", state.digest)
                self.next(process)

    def _prepare(self, process: Process, epoch: int, number: int) -> None:
        machine = process.machine
        if not process.runs or machine is None or (machine.view.epoch, process.number) != (epoch, number):
            return
        if process.asleep:
            process.inbox.append(partial(self._prepare, process, epoch, number))
            return
        state = process.operations.state(number)
        if state is None or state.state != "begun":
            return
        digest = sha256(repr((epoch, number, machine.view.members)).encode()).digest()[:16]
        if process.operations.prepare(number, digest):
            process.prepared[process.member] = digest
            self.say(process, "prepared", digest)
            self._look(process)

    def next(self, process: Process) -> None:
        assert process.machine is not None
        self.after(self.compute_s, partial(self.begin, process, process.machine.view.epoch, process.number + 1))

    def end(self, process: Process, how: str, digest: bytes) -> None:
        assert process.machine is not None
        self.end_in(process, process.machine.view.members, process.number, how, digest)

    def end_in(self, process: Process, members: tuple[Member, ...], number: int, how: str, digest: bytes) -> None:
        process.ended[number] = Ending(how, digest, members)
        self.exercised.committed += how == "committed"
        self.exercised.aborted += how == "aborted"
        if how == "committed" and process.machine is not None:
            process.worked_in = process.machine.view.epoch
        for other in self.processes.values():
            self.compare(number, process, other)

    def compare(self, number: int, one: Process, other: Process) -> None:
        """No two have ended an operation differently: but who gave up by itself and went on in no further view."""
        mine, theirs = one.ended.get(number), other.ended.get(number)
        if mine is None or theirs is None or mine == theirs:
            return
        for aborted, committed, process in ((mine, theirs, one), (theirs, mine, other)):
            gave_up = aborted.how == "aborted" and committed.how == "committed"
            if gave_up and process.member not in committed.members:
                return
        raise self.broken(
            f"operation {number}: {mine.how} at {one.member.peer_id}, {theirs.how} at {other.member.peer_id}"
        )

    def cancel(self, process: Process) -> None:
        """Its caller gives the collective up: allowed until it has prepared."""
        if process.machine is None or process.asleep or not process.number:
            return
        if process.operations.abort(process.number):
            self.exercised.cancels += 1
            self.end(process, "aborted", b"")
            self.say(process, "abort", b"")
            self.next(process)
