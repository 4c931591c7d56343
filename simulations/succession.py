"""A deterministic world for views that follow views.

One seed runs the production :class:`~sparkle_mesh.membership.view_change.ViewChange` machines of N processes under a
virtual clock, and for each of them training loops of two-phase collectives in small: begin, prepare, commit. Messages
between two processes keep their order and are delayed at random; connections break, one way or both; clocks go at
different speeds; processes crash, sleep, are suspected wrongly, leave, say what makes no sense, and come back as new
members, with their disk, which holds their identity, or without. Which kinds of fault a seed has is drawn per seed, and
so is whether tables are small enough to fill. After every event the safety checks run; then faults stop and progress is
required.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import msgspec

from simulations.network import InvariantBroken
from simulations.small_collectives import Ending, Exercised, Process, SmallCollectives, key_of
from sparkle_mesh import limits
from sparkle_mesh.membership.instructions import Entered, Excluded, Frozen, Instruction, QuorumMissing, SendTo
from sparkle_mesh.membership.messages import Accept, Agreement, Chosen, Declined, OperationList, Prepare, Promise
from sparkle_mesh.membership.operations import SEQUENCE_BITS, is_routed
from sparkle_mesh.membership.succession import joins
from sparkle_mesh.membership.view import Member, View, first_view
from sparkle_mesh.membership.view_change import ViewChange, is_quorum

__all__ = ["Exercised", "InvariantBroken", "World"]

MESH_ID = b"views that follow views 32 bytes"
FAULTS_UNTIL_S = 20.0
ENDS_AT_S = 300.0
LOOK_INTERVAL_S = 10.0
#: Of operations that a member names when a view is entered: those in flight in three streams, and what ended amid them.
NAMED_MAX_COUNT = 30
#: Where tables are small: room for all that is open, and little more.
SMALL_LIMITS = {
    "OPERATIONS_OPEN_MAX_COUNT": 10,
    "MEMBERS_SUSPECTED_MAX_COUNT": 24,
}


class World(SmallCollectives):
    """The world of one seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._lives = 0
        draw = self.random.choice
        self.count = draw([2, 2, 3, 3, 4, 5, 6, 8, 12, 16])
        self._rates = {
            name: draw([0.0, 0.0, 0.3, 1.0])
            for name in (
                *("crash", "cut", "sleep", "suspect", "leave", "join"),
                *("cancel", "behead", "renew", "garble", "settle", "disk"),
            )
        }
        self._small = self.random.random() < 0.3
        # Of the time that passes, by how much a clock may be off.
        self._skew = draw([0.0, 0.01, 0.3])
        members = [self._new_process(index) for index in range(self.count)]
        view = first_view(MESH_ID, [(bytes(16), process.member) for process in members])
        for process in members:
            self._enter_first(process, view)
        self.at(0.1, self._maybe_fault)

    # --- Time -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Run to the end; raise InvariantBroken if a check fails."""
        with mock.patch.dict(vars(limits), SMALL_LIMITS if self._small else {}):
            self._run()

    def _run(self) -> None:
        next_look_s = FAULTS_UNTIL_S
        while (next_s := self.next_at()) is not None and next_s <= ENDS_AT_S:
            if next_s >= next_look_s:
                next_look_s += LOOK_INTERVAL_S
                if self._what_is_missing() is None:
                    return
            self.step()
        missing = self._what_is_missing()
        if missing is not None:
            raise self.broken(f"after {ENDS_AT_S:g} s {missing}")

    def now_of(self, process: Process) -> float:
        """What the clock of ``process`` shows."""
        offset, speed = process.clock
        return offset + speed * self.now

    # --- Processes ------------------------------------------------------------------------------

    def _new_process(self, index: int) -> Process:
        self._lives += 1
        member = Member(peer_id=f"peer-{index:02}", incarnation=self._lives.to_bytes(16, "big"))
        skew = self.random.uniform(-self._skew, self._skew)
        process = self.processes[member] = Process(member, index, (self.random.uniform(0, 1000), 1 + skew))
        return process

    def _enter_first(self, process: Process, view: View, chosen: Chosen | None = None) -> None:
        process.machine = ViewChange(view, process.member, process.operations, now=self.now_of(process), chosen=chosen)
        process.views.setdefault(view.epoch, (view, ()))
        for member, other in self.processes.items():
            if member not in view.members and other.runs and other.machine is None:
                self.after(self.mean_delay_s, partial(self._introduce, process, other))
        self._suspect_the_dead(process, view)
        self.schedule_tick(process)
        self.begin_all(process)

    def _suspect_the_dead(self, process: Process, view: View) -> None:
        """No link to them comes about."""
        for other in [self.processes[member] for member in view.members]:
            if not other.alive:
                self.after(0.5, partial(self._suspect, process, other))

    def _join(self, index: int) -> None:
        """A process comes that wants to be a member: all members are told, each in its time."""
        if any(process.runs and process.index == index for process in self.processes.values()):
            return
        newcomer = self._new_process(index)
        self.exercised.joins += 1
        self.note(f"{newcomer.member.peer_id} comes as a candidate")
        for process in list(self.processes.values()):
            if process.machine is not None and process.runs:
                self.after(self.mean_delay_s, partial(self._introduce, process, newcomer))

    def _introduce(self, process: Process, newcomer: Process) -> None:
        if newcomer.runs and newcomer.machine is None:
            self._tell(process, lambda machine: machine.candidate_came(newcomer.member, now=self.now_of(process)))

    def _tell(self, process: Process, event: Callable[[ViewChange], list[Instruction]]) -> None:
        """Let something happen at ``process``, once it is awake."""
        if not process.runs:
            return
        if process.asleep:
            process.inbox.append(partial(self._tell, process, event))
        elif process.machine is not None:
            self._carry_out(process, event(process.machine))

    # --- Faults ---------------------------------------------------------------------------------

    def _maybe_fault(self) -> None:
        if self.now >= FAULTS_UNTIL_S:
            return
        faults: dict[str, Callable[[Process], None]] = {
            "crash": self._crash,
            "cut": self._cut,
            "sleep": self._sleep,
            "suspect": self._suspect_wrongly,
            "leave": self._leave,
            "join": lambda process: self._join(self.count + self.random.randrange(4)),
            "cancel": self.cancel,
            "renew": self._renew,
            "settle": self._settle_elsewhere,
        }
        running = [process for process in self.processes.values() if process.runs]
        for name, rate in self._rates.items():
            if name in faults and running and self.random.random() < rate * 0.1:
                faults[name](self.random.choice(running))
                running = [process for process in running if process.runs]
        self.at(self.now + 0.1, self._maybe_fault)

    def _crash(self, process: Process) -> None:
        machine = process.machine
        self.note(f"{process.member.peer_id} crashes")
        self.exercised.crashes += 1
        if machine is not None and not machine.excluded:
            self.exercised.proposer_deaths += machine.is_accepting
            self._count_doubt(process)
        process.alive = False
        self._suspected_by_all(process)
        if self.random.random() < 0.7:
            self.at(self.now + self.random.uniform(0.5, 3.0), partial(self._join, self._index_after(process)))

    def _suspected_by_all(self, process: Process) -> None:
        for other in list(self.processes.values()):
            if other is not process and other.runs:
                self.after(0.5, partial(self._suspect, other, process))

    def _index_after(self, process: Process) -> int:
        """Whoever has lost its disk comes back as somebody else."""
        if self.random.random() >= self._rates["disk"]:
            return process.index
        self.exercised.disks_lost += 1
        return 100 + self._lives

    def _count_doubt(self, process: Process) -> None:
        states = (process.operations.state(number) for number in process.at.values())
        self.exercised.in_doubt += any(state is not None and state.state == "prepared" for state in states)

    def _renew(self, process: Process) -> None:
        if process.machine is not None:
            self.exercised.renewals += 1
            self._tell(process, lambda machine: machine.renew(now=self.now_of(process)))

    def _settle_elsewhere(self, process: Process) -> None:
        """Somebody that wanted to be a member, or never did, turns out to be in another mesh of the name."""
        candidates = [other for other in self.processes.values() if other.runs and other.machine is None]
        if candidates:
            process = self.random.choice(candidates)
            process.alive = False
            self._suspected_by_all(process)
        elif process.machine is not None:
            return
        self.exercised.settled_elsewhere += 1
        self.note(f"{process.member.peer_id} is in another mesh")
        for other in list(self.processes.values()):
            self.after(self.mean_delay_s, partial(self._hear_of_another_mesh, other, process))

    def _hear_of_another_mesh(self, process: Process, other: Process) -> None:
        self._tell(process, lambda machine: machine.settled_elsewhere(other.member, now=self.now_of(process)))

    def _behead(self, process: Process) -> None:
        """A proposer dies between its proposal and the choice."""
        if self.now < FAULTS_UNTIL_S and process.runs and process.machine is not None and process.machine.is_accepting:
            self._crash(process)

    def _suspect(self, process: Process, other: Process) -> None:
        self._tell(process, lambda machine: machine.suspect(other.member, now=self.now_of(process)))

    def _trust(self, process: Process, other: Process) -> None:
        if other.runs and not other.asleep and (process.member, other.member) not in self.severed:
            self._tell(process, lambda machine: machine.trust(other.member, now=self.now_of(process)))
            if self.random.random() < 0.5:
                # Its connection had ended: it comes as newcomers do, whether it knows what has become of it or not.
                self._tell(process, lambda machine: machine.candidate_came(other.member, now=self.now_of(process)))

    def _cut(self, process: Process) -> None:
        """Part of the processes lose the others, in one direction or both, for a while."""
        running = [other for other in self.processes.values() if other.runs]
        side = {process.member} | {other.member for other in running if self.random.random() < 0.4}
        pairs = [(a, b) for a in running for b in running if (a.member in side) != (b.member in side)]
        if self.random.random() < 0.3:
            pairs = [(a, b) for a, b in pairs if a.member in side]
        elif pairs and self.random.random() < 0.3:
            # All others reach both.
            a, b = self.random.choice(pairs)
            pairs = [(a, b), (b, a)]
        self.note(f"no way from and to: {sorted((a.member.peer_id, b.member.peer_id) for a, b in pairs)}")
        self.exercised.partitions += 1
        for a, b in pairs:
            self.severed.add((a.member, b.member))
            # Who hears nothing suspects; and who is not heard is told so, or finds its connection broken.
            self.after(0.5, partial(self._suspect_severed, b, a))
            self.after(0.5, partial(self._suspect_severed, a, b))
        self.at(self.now + self.random.uniform(0.2, 6.0), partial(self._end_partition, pairs))

    def _suspect_severed(self, process: Process, other: Process) -> None:
        if self.severed & {(process.member, other.member), (other.member, process.member)}:
            self._suspect(process, other)

    def _end_partition(self, pairs: list[tuple[Process, Process]]) -> None:
        for a, b in pairs:
            self.heal(a.member, b.member)
        for a, b in pairs:
            self.after(0.2, partial(self._trust, a, b))
            self.after(0.2, partial(self._trust, b, a))

    def _sleep(self, process: Process) -> None:
        if process.asleep:
            return
        self.note(f"{process.member.peer_id} falls asleep")
        self.exercised.sleeps += 1
        process.asleep = True
        others = [other for other in self.processes.values() if other is not process and other.runs]
        for other in others:
            self.after(1.0, partial(self._suspect_sleeper, other, process))
        longest_s = self.random.choice([1.0, 6.0, 6.0, 15.0])
        self.at(self.now + self.random.uniform(0.2, longest_s), partial(self._wake, process))

    def _suspect_sleeper(self, process: Process, other: Process) -> None:
        if other.asleep:
            self._suspect(process, other)

    def _wake(self, process: Process) -> None:
        process.asleep = False
        waiting, process.inbox = process.inbox, []
        for action in waiting:
            action()
        for other in list(self.processes.values()):
            if other is not process and other.runs:
                self.after(0.2, partial(self._trust, other, process))

    def _suspect_wrongly(self, process: Process) -> None:
        others = [other for other in self.processes.values() if other is not process and other.runs]
        if not others:
            return
        other = self.random.choice(others)
        self.note(f"{process.member.peer_id} wrongly suspects {other.member.peer_id}")
        self.exercised.wrong_suspicions += 1
        self._suspect(process, other)
        self.at(self.now + self.random.uniform(0.1, 3.0), partial(self._trust, process, other))

    def _leave(self, process: Process) -> None:
        if process.machine is None:
            return
        self.note(f"{process.member.peer_id} wants to leave")
        self.exercised.leaves += 1
        for other in list(self.processes.values()):
            if other.runs:
                self.after(
                    self.mean_delay_s,
                    partial(self._hear_of_leaving, other, process),
                )

    def _hear_of_leaving(self, process: Process, other: Process) -> None:
        self._tell(process, lambda machine: machine.wants_to_leave(other.member, now=self.now_of(process)))

    # --- Machines -------------------------------------------------------------------------------

    def schedule_tick(self, process: Process) -> None:
        """Let the machine do what is due, when it is."""
        wakeup = None if process.machine is None else process.machine.next_wakeup(now=self.now_of(process))
        if wakeup is not None and process.runs:
            offset, speed = process.clock
            self.at(max((wakeup - offset) / speed, self.now), partial(self._tick, process, wakeup))

    def _tick(self, process: Process, wakeup: float) -> None:
        if process.asleep:
            process.inbox.append(partial(self._tick, process, wakeup))
        elif process.alive and process.machine is not None:
            now = max(self.now_of(process), wakeup)
            if process.excluded or process.machine.next_wakeup(now=now) == wakeup:
                self._carry_out(process, process.machine.tick(now=now))

    def _carry_out(self, process: Process, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case SendTo(member, message):
                    if isinstance(message, Accept) and self.random.random() < self._rates["behead"] * 0.05:
                        self.after(self.mean_delay_s, partial(self._behead, process))
                    if self.random.random() < self._rates["garble"] * 0.02 and self.now < FAULTS_UNTIL_S:
                        self._send_garbled(process.member, member, message)
                    self.transmit(process.member, member, partial(self._deliver, process.member, member, message))
                case Frozen(_, operations):
                    process.before = {state.number: state for state in operations}
                    self.exercised.in_doubt += any(state.state == "prepared" for state in operations)
                case Entered(view, outcomes, _):
                    self._entered(process, view, outcomes)
                case Excluded(view, outcomes):
                    if outcomes is not None:
                        self._settle(process, view, outcomes)
                    self._left(process)
                case QuorumMissing():
                    process.lost_quorum = True
                    self.exercised.quorum_losses += 1
        self.schedule_tick(process)

    def _send_garbled(self, sender: Member, receiver: Member, message: Agreement) -> None:
        """Something that makes no sense to the receiver goes ahead of what does."""
        match message:
            case Prepare() | Promise():
                message = msgspec.structs.replace(message, lineage=bytes(32))
            case Accept(view=view) | Chosen(view=view):
                unsound = msgspec.structs.replace(view, members=(*view.members, view.members[0]))
                foreign = msgspec.structs.replace(view, lineage=bytes(32))
                newcomer = self.processes[receiver].machine is None
                message = msgspec.structs.replace(
                    message, view=unsound if newcomer else self.random.choice([unsound, foreign])
                )
            case Declined():
                message = msgspec.structs.replace(message, epoch=message.epoch + 3)
            case _:
                message = msgspec.structs.replace(message, epoch=message.epoch + 1)
        self.exercised.garbled += 1
        self.transmit(sender, receiver, partial(self._deliver, sender, receiver, message))

    def _deliver(self, sender: Member, receiver: Member, message: Agreement) -> None:
        process = self.processes[receiver]
        if not process.alive:
            return
        if process.asleep:
            process.inbox.append(partial(self._deliver, sender, receiver, message))
            return
        self.note(f"{sender.peer_id} -> {receiver.peer_id} {type(message).__name__}")
        if process.machine is not None:
            self._carry_out(process, process.machine.receive(sender, message, now=self.now_of(process)))
        elif joins(message, receiver, MESH_ID) is not None and isinstance(message, Chosen):
            self.note(f"{receiver.peer_id} joins epoch {message.view.epoch}")
            self._check_view(process, message.view, message.outcomes)
            process.operations.join(message.streams, message.outcomes)
            for stream in self.streams:
                process.at[stream] = stream << SEQUENCE_BITS | process.operations.begun(stream)
            self._keep_settled(process, message.outcomes, message.view)
            self._enter_first(process, message.view, message)

    def _entered(self, process: Process, view: View, outcomes: OperationList) -> None:
        self.exercised.views += 1
        self.note(f"{process.member.peer_id} enters epoch {view.epoch}: {[m.peer_id for m in view.members]}")
        self._settle(process, view, outcomes)
        if len(process.operations.standing().operations) > NAMED_MAX_COUNT:
            raise self.broken(f"{process.member.peer_id} names ever more operations")
        self._suspect_the_dead(process, view)
        process.lost_quorum = False
        process.heard = {}
        process.at = {stream: number for stream, number in process.at.items() if not is_routed(stream)}
        for key in [key for key in process.ahead if key[0] < view.epoch]:
            del process.ahead[key]
        self.begin_all(process)

    def _keep_settled(self, process: Process, outcomes: OperationList, view: View) -> None:
        for outcome in outcomes:
            ahead = outcome.number > process.at.get(outcome.number >> SEQUENCE_BITS, 0)
            if ahead and outcome.state != "repeat" and not is_routed(outcome.number >> SEQUENCE_BITS):
                process.settled.setdefault(outcome.number, Ending(outcome.state, outcome.digest, view.members))

    def _settle(self, process: Process, view: View, outcomes: OperationList) -> None:
        """End what was open in the epoch before as was decided."""
        self._check_view(process, view, outcomes)
        if view.epoch - 1 not in process.views:
            raise self.broken(f"{process.member.peer_id} enters epoch {view.epoch} without the one before")
        self._keep_settled(process, outcomes, view)
        for outcome in outcomes:
            number, held = outcome.number, process.before.get(outcome.number)
            stays = process.member in view.members
            ended = process.ended.get(key_of(number, view.epoch - 1))
            if outcome.state == "repeat":
                if ended is not None and (stays or ended.how == "committed"):
                    raise self.broken(f"{process.member.peer_id} is to repeat operation {number}, which it has ended")
            elif ended is not None:
                if ended.how == outcome.state and outcome.digest in (ended.digest, b""):
                    continue
                if ended.how == "aborted" and not stays:
                    continue  # it gave up by itself, and does not go on
                how = f"{ended.how}, and not {outcome.state}"
                raise self.broken(f"{process.member.peer_id} has ended operation {number} as {how}")
            elif number <= process.at.get(number >> SEQUENCE_BITS, 0):
                if outcome.state == "committed" and (held is None or held.state != "prepared"):
                    if stays:
                        raise self.broken(f"{process.member.peer_id} is to commit what it has not prepared")
                    continue
                self.exercised.committed_by_view += outcome.state == "committed"
                # Nobody names what all that were heard have committed.
                digest = held.digest if held is not None and outcome.state == "committed" else b""
                self.end_in(process, view, number, outcome.state, outcome.digest or digest, epoch=view.epoch - 1)
        for number, state in process.before.items():
            decided = any(outcome.number == number for outcome in outcomes)
            ended_before = key_of(number, view.epoch - 1) in process.ended
            if process.member in view.members and not decided and not ended_before:
                raise self.broken(f"operation {number} of {process.member.peer_id}, {state.state}, was forgotten")

    def _check_view(self, process: Process, view: View, outcomes: OperationList) -> None:
        process.views[view.epoch] = (view, outcomes)
        for other in self.processes.values():
            theirs = other.views.get(view.epoch)
            if theirs is not None and (theirs[0] != view or (theirs[1] != outcomes and view.epoch)):
                raise self.broken(f"two views of epoch {view.epoch}")

    def _left(self, process: Process) -> None:
        self.note(f"{process.member.peer_id} is out")
        process.excluded = True
        self.exercised.excluded += 1
        self._suspected_by_all(process)
        self.at(self.now + self.random.uniform(0.5, 3.0), partial(self._join, self._index_after(process)))

    # --- Progress -------------------------------------------------------------------------------

    def _what_is_missing(self) -> str | None:
        """Once faults have stopped, the members of the last view that make a quorum go on, and take all others in."""
        last = max(epoch for process in self.processes.values() for epoch in process.views)
        view = next(process.views[last][0] for process in self.processes.values() if last in process.views)
        alive = {process.member: process for process in self.processes.values() if process.runs}
        left = [member for member in view.members if member in alive]
        if not is_quorum(view, left):
            return None
        machines = {member: machine for member in left if (machine := alive[member].machine) is not None}
        late = [m.peer_id for m in left if m not in machines or machines[m].view.epoch != last]
        if late:
            return f"{late} have not come to epoch {last}"
        if len(left) != view.size:
            return f"epoch {last} still has members that are gone"
        if set(alive) != set(view.members):
            return f"{sorted(m.peer_id for m in set(alive) - set(view.members))} are not taken in"
        for member in left:
            if machines[member].candidate_count(now=float("inf")):
                return f"{member.peer_id} waits for a candidate that is not there"
            idle = [stream for stream in self.streams if alive[member].worked_in.get(stream) != last]
            if idle:
                return f"{member.peer_id} has done nothing in epoch {last} in stream {idle[0]}"
        return None
