"""A deterministic world for the formation of first views.

One seed runs N production :class:`~sparkle_mesh.membership.formation.Formation` machines under a virtual clock,
over a simulated network: messages between two processes keep their order and are delayed at random;
connections break and come back; processes come late, crash, and come back as new members. Which kinds of
fault a seed has is drawn per seed. After every event the safety checks run; then faults stop and progress is
required.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from simulations.network import Counts, Network
from sparkle_mesh.membership.formation import Candidate, Formation, Instruction, SendTo, ViewAgreed
from sparkle_mesh.membership.messages import Agreement
from sparkle_mesh.membership.view import Member, View

MESH_ID = b"formation world mesh id 32 bytes"
FAULTS_UNTIL_S = 20.0
ENDS_AT_S = 120.0


@dataclass(slots=True)
class Process:
    """One life of one simulated process."""

    member: Member
    machine: Formation
    alive: bool = True
    connected: set[Member] = field(default_factory=set)
    lost: set[Member] = field(default_factory=set)
    views: list[View] = field(default_factory=list)


@dataclass(slots=True)
class Exercised(Counts):
    """How often a run met each situation."""

    crashes: int = 0
    proposer_crashes: int = 0
    disconnects: int = 0
    late_joins: int = 0
    views: int = 0


class World(Network):
    """The world of one seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.exercised = Exercised()
        self.processes: dict[Member, Process] = {}
        self.count = self.random.randint(1, 8)
        self.min_peers = self.random.randint(1, self.count)
        self._crash_rate = self.random.choice([0.0, 0.0, 0.2, 0.5])
        self._disconnect_rate = self.random.choice([0.0, 0.0, 0.3, 1.0])
        self._spread_s = self.random.choice([0.0, 0.5, 5.0])
        for index in range(self.count):
            self.at(self.random.uniform(0, self._spread_s), partial(self._start, index))
        self.at(0.1, self._maybe_fault)

    # --- Events ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Run to the end; raise InvariantBroken if a check fails."""
        while (next_s := self.next_at()) is not None and next_s <= ENDS_AT_S:
            self.step()
            self._check_safety()
        self._check_progress()

    def _start(self, index: int) -> None:
        member = Member(peer_id=f"peer-{index}", incarnation=self.random.randbytes(16))
        candidate = Candidate(member, bytes([index % 3]) * 16, self.min_peers)
        process = Process(member, Formation(MESH_ID, candidate, now=self.now))
        self.processes[member] = process
        self.note(f"{member.peer_id} starts")
        if any(other.views for other in self.processes.values()):
            self.exercised.late_joins += 1
        for other in list(self.processes.values()):
            if other is not process:
                self.after(self.mean_delay_s, partial(self._connect, process, other))
        self._schedule_tick(process)

    def _connect(self, a: Process, b: Process) -> None:
        if not (a.alive and b.alive) or b.member in a.connected:
            return
        for one, other in ((a, b), (b, a)):
            for member in [m for m in one.connected if m.peer_id == other.member.peer_id]:
                self._disconnect(one, self.processes[member])  # an earlier life of the same peer
            one.connected.add(other.member)
            candidate = Candidate(other.member, bytes([int(other.member.peer_id[5:]) % 3]) * 16, self.min_peers)
            self._carry_out(one, one.machine.candidate_came(candidate, now=self.now))

    def _disconnect(self, a: Process, b: Process) -> None:
        for one, other in ((a, b), (b, a)):
            if other.member in one.connected:
                one.connected.discard(other.member)
                one.lost.add(other.member)
                if one.alive:
                    self._carry_out(one, one.machine.candidate_went(other.member.peer_id, now=self.now))

    def _crash(self, process: Process) -> None:
        self.note(f"{process.member.peer_id} crashes")
        self.exercised.crashes += 1
        self.exercised.proposer_crashes += process.machine.is_proposing
        process.alive = False
        for other in list(self.processes.values()):
            if other is not process:
                self.after(self.mean_delay_s, partial(self._disconnect, process, other))
        if self.random.random() < 0.7:
            index = int(process.member.peer_id[5:])
            self.at(self.now + self.random.uniform(0.5, 3.0), partial(self._start, index))

    def _maybe_fault(self) -> None:
        if self.now >= FAULTS_UNTIL_S:
            return
        alive = [process for process in self.processes.values() if process.alive]
        if alive and self.random.random() < self._crash_rate * 0.1:
            self._crash(self.random.choice(alive))
        if len(alive) > 1 and self.random.random() < self._disconnect_rate * 0.1:
            a, b = self.random.sample(alive, 2)
            self.note(f"{a.member.peer_id} and {b.member.peer_id} lose each other")
            self.exercised.disconnects += 1
            self._disconnect(a, b)
            self.at(self.now + self.random.uniform(0.1, 2.0), partial(self._connect, a, b))
        self.at(self.now + 0.1, self._maybe_fault)

    # --- Machines -------------------------------------------------------------------------------

    def _schedule_tick(self, process: Process) -> None:
        wakeup = process.machine.next_wakeup()
        if wakeup is not None and process.alive:
            self.at(max(wakeup, self.now), partial(self._tick, process, wakeup))

    def _tick(self, process: Process, wakeup: float) -> None:
        if process.alive and process.machine.next_wakeup() == wakeup:
            self._carry_out(process, process.machine.tick(now=self.now))

    def _carry_out(self, process: Process, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, SendTo):
                self._send(process, instruction.peer_id, instruction.message)
            elif isinstance(instruction, ViewAgreed):
                self.note(f"{process.member.peer_id} enters {[m.peer_id for m in instruction.view.members]}")
                process.views.append(instruction.view)
                self.exercised.views += 1
        self._schedule_tick(process)

    def _send(self, sender: Process, peer_id: str, message: Agreement) -> None:
        for member in sender.connected:
            if member.peer_id == peer_id:
                receiver = self.processes[member]
                self.transmit(sender.member, member, partial(self._deliver, sender.member, receiver, message))
                return

    def _deliver(self, sender: Member, receiver: Process, message: Agreement) -> None:
        if receiver.alive and sender in receiver.connected:
            self.note(f"{sender.peer_id} -> {receiver.member.peer_id} {type(message).__name__}")
            self._carry_out(receiver, receiver.machine.receive(sender.peer_id, message, now=self.now))

    # --- Checks ---------------------------------------------------------------------------------

    def _check_safety(self) -> None:
        lineages: dict[bytes, View] = {}
        for process in self.processes.values():
            if len(process.views) > 1:
                raise self.broken(f"{process.member.peer_id} entered two views")
            for view in process.views:
                if view.rank_of(process.member) is None or view.size < self.min_peers:
                    raise self.broken(f"{process.member.peer_id} entered a view it cannot be in")
                if lineages.setdefault(view.lineage, view) != view:
                    raise self.broken("two views of one lineage differ")

    def _check_progress(self) -> None:
        """Once faults have stopped, whoever could be in a whole view is in one, and all its members with it.

        A view two of whose members ever lost each other is not whole: it is of no use to its members, who are
        told of the loss.
        """
        alive = {process.member: process for process in self.processes.values() if process.alive}
        for process in alive.values():
            for view in process.views:
                members = [alive[member] for member in view.members if member in alive]
                whole = len(members) == view.size and not any(m.lost & set(view.members) for m in members)
                if whole and not all(member.views == [view] for member in members):
                    raise self.broken("a whole view is not known to all its members")
        taken = {member for process in alive.values() for view in process.views for member in view.members}
        free = [member for member in alive if member not in taken]
        # Where a view stands, its members take newcomers in; that is another world.
        waiting = any(alive[member].machine.views_elsewhere for member in free)
        if len(free) >= self.min_peers and not waiting:
            raise self.broken(f"{len(free)} free processes did not form a view")
