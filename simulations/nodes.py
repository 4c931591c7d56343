"""A deterministic world of whole nodes: membership, views, links and collectives as in production, in virtual time.

One seed runs N nodes in one trio run whose clock jumps from event to event: every node's production
:class:`~sparkle_mesh.membership.service.MembershipService`, :class:`~sparkle_mesh.view_follower.ViewFollower` with its
group of collectives, and :class:`~sparkle_mesh.synchronization.Synchronizer`, over a simulated control plane and
simulated links with delay and rate. Nodes train; they crash, stop running for a while, lose links, are cut off,
leave, give calls up, and come back as new ones. After every collective its sum is checked against what its contributors
put in, and against what others have of the same operation; then faults stop, and all must make progress together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import trio
import trio.testing

from simulations.network import Counts, InvariantBroken
from simulations.trio_run import Pauses, SeededEntropy, deterministic_scheduling
from sparkle_mesh import limits
from sparkle_mesh.collectives.group import CollectiveGroup
from sparkle_mesh.errors import (
    ClosedError,
    CollectiveAbortedError,
    CollectiveTimeoutError,
    DivergenceError,
    LinkClosedError,
    MeshMergedError,
    OutcomeUnknownError,
    PeerLostError,
    QuorumLostError,
    UnreachableError,
)
from sparkle_mesh.fabric.memory import MemoryFabric, MemoryFabricNetwork
from sparkle_mesh.membership.keys import MeshSecrets
from sparkle_mesh.membership.service import MembershipService
from sparkle_mesh.membership.view import Member
from sparkle_mesh.nurseries import bare_errors
from sparkle_mesh.synchronization import Synchronizer
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.memory import MemoryLink, memory_link_pair
from sparkle_mesh.view_follower import ViewFollower

FAULTS_UNTIL_S = 15.0
ENDS_AT_S = 400.0
#: What all that are left must do together after the last fault.
STEPS_AFTER_COUNT = 4
ELEMENTS = 3_000
#: Newcomers do not form a mesh of their own: they wait for that of the others.
NEVER = 1_000


@dataclass(slots=True)
class Exercised(Counts):
    """How often a run met each situation."""

    crashes: int = 0
    link_losses: int = 0
    partitions: int = 0
    joins: int = 0
    leaves: int = 0
    cancels: int = 0
    pauses: int = 0
    views: int = 0
    reductions: int = 0
    lost_calls: int = 0
    excluded: int = 0
    forks: int = 0
    merged: int = 0
    synchronized: int = 0


@dataclass(slots=True)
class Node:
    """One life of one simulated process."""

    name: str
    fabric: MemoryFabric
    service: MembershipService
    scope: trio.CancelScope
    min_peers: int
    follower: ViewFollower | None = None
    links: list[MemoryLink] = field(default_factory=list)
    alive: bool = True
    leaving: bool = False
    steps_after: int = 0

    @property
    def merged_into(self) -> bytes | None:
        """The lineage because of which that of this node has dissolved."""
        verdict = self.service.verdict
        return None if verdict is None else verdict.into

    @property
    def is_member(self) -> bool:
        """Whether it is in a view, or was."""
        return self.follower is not None and self.follower.group is not None

    @property
    def group(self) -> CollectiveGroup:
        assert self.follower is not None
        assert self.follower.group is not None
        return self.follower.group


@dataclass(slots=True)
class _Wanted:
    """A link that one end waits for."""

    link: MemoryLink | None = None
    made: trio.Event = field(default_factory=trio.Event)


class World:
    """The world of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.exercised = Exercised()
        self.trace: list[str] = []
        draw = self.random.choice
        # The largest take as long as dozens of the others.
        self.count = draw([*[2, 3, 3, 4, 4, 5, 6, 8] * 5, 12, 16])
        self._delay_s = draw([0.0005, 0.005, 0.05])
        self._rate = draw([None, 1e6, 1e8])
        # Many nodes do less each.
        self._compute_s = draw([0.1, 0.5, 1.5]) if self.count < 8 else 1.5
        self._rates = {
            name: draw([0.0, 0.3, 1.0])
            for name in ("crash", "drop", "partition", "join", "leave", "cancel", "pause", "fork")
        }
        self._pauses = Pauses()
        self._nodes: list[Node] = []
        self._lives = 0
        self._wanted: dict[tuple[str, str], _Wanted] = {}
        #: By operation: what came of it, and who contributed.
        self._results: dict[tuple[bytes, int], tuple[bytes, tuple[Member, ...]]] = {}
        self._states: dict[tuple[bytes, int], bytes] = {}
        self._views: set[tuple[bytes, int]] = set()
        #: By lineage that has dissolved: the one that it had met.
        self._dissolved: dict[bytes, bytes] = {}
        self._failure: InvariantBroken | None = None
        self._quiet = False

    # --- Running ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Run to the end; raise InvariantBroken if a check fails."""
        with deterministic_scheduling(self.seed), self._pauses.installed():
            trio.run(self._main, clock=trio.testing.MockClock(autojump_threshold=0))
        if self._failure is not None:
            raise self._failure

    async def _main(self) -> None:
        self._network = MemoryFabricNetwork(delay_s=self._delay_s)
        self._stepped = trio.Event()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await self._begin()
            nursery.start_soon(self._do_damage)
            with trio.move_on_at(trio.current_time() + ENDS_AT_S):
                await self._until_all_is_well()
                self._pauses.resume_all()
                nursery.cancel_scope.cancel()
            if not nursery.cancel_scope.cancel_called:
                self._break(f"after {ENDS_AT_S:g} s {self._what_is_missing()}")
            self._pauses.resume_all()
            nursery.cancel_scope.cancel()

    async def _until_all_is_well(self) -> None:
        while self._failure is None and not (self._quiet and self._what_is_missing() is None):
            await self._stepped.wait()

    def _what_is_missing(self) -> str | None:
        alive = [node for node in self._nodes if node.alive]
        if not all(node.is_member for node in alive):
            return f"{[node.name for node in alive]} are not all in a view"
        late = [node.name for node in alive if node.steps_after < STEPS_AFTER_COUNT]
        if late:
            return f"{late} have not made {STEPS_AFTER_COUNT} steps"
        views = {node.group.members for node in alive}
        return None if len(views) == 1 else f"there are {len(views)} views"

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        self.trace.append(f"{trio.current_time():9.4f} {text}")

    def _break(self, what: str) -> None:
        self.note(what)
        if self._failure is None:
            self._failure = InvariantBroken(f"seed {self.seed}: {what}")
        self._stepped.set()

    async def _begin(self) -> None:
        """Start the first nodes; at times in two groups that do not know each other, and form a mesh each."""
        apart = self.count >= 4 and self.random.random() < 0.2
        size = self.count // 2 if apart else self.count
        if apart:
            names = [f"node-{self._lives + 1 + index:03}" for index in range(self.count)]
            self._network.partition(names[:size], names[size:])
        for _ in range(self.count):
            await self._start(size)
        if apart:
            await trio.sleep(self.random.choice([3.0, 10.0]))
            self._network.heal()

    # --- Nodes -----------------------------------------------------------------------------------

    async def _start(self, min_peers: int) -> Node:
        self._lives += 1
        node: Node = await self._nursery.start(self._live, f"node-{self._lives:03}", min_peers)
        return node

    async def _live(self, name: str, min_peers: int, *, task_status: trio.TaskStatus[Node]) -> None:
        entropy = SeededEntropy(random.Random(self.random.random()))
        self._pauses.adopt(name)
        with trio.CancelScope() as scope, suppress(ClosedError), bare_errors():
            async with self._network.open(name) as fabric, trio.open_nursery() as nursery:
                service = MembershipService(
                    fabric,
                    MeshSecrets("world", None),
                    role="trainer",
                    host_id=bytes(16),
                    incarnation=entropy.token(16),
                    min_peers=min_peers,
                    settle_s=limits.REJOIN_SETTLE_S if min_peers == 1 else limits.VIEW_SETTLE_S,
                    public=True,
                    heard=lambda peer_id, addresses, source, role: None,
                    entropy=entropy,
                )
                node = Node(name, fabric, service, scope, min_peers)
                self._nodes.append(node)
                await nursery.start(service.run)
                node.follower = ViewFollower(service, partial(self._connect, node), None)
                await nursery.start(node.follower.run)
                nursery.start_soon(self._meet, node)
                nursery.start_soon(self._train, node)
                task_status.started(node)
                await trio.sleep_forever()
        # A crash closes the control plane under it.
        node.alive = False

    async def _meet(self, node: Node) -> None:
        """Stay connected to all others that live, as discovery sees to; once more to those that were not admitted."""
        seen_at: dict[str, float] = {}
        while True:
            for other in list(self._nodes):
                if other.alive and other.name > node.name and not node.service.is_admitted(other.name):
                    now = trio.current_time()
                    if other.name in node.fabric.connected_peers():
                        if now > seen_at.setdefault(other.name, now) + limits.DISCOVERY_REFUSED_BACKOFF_MIN_S:
                            await node.fabric.disconnect(other.name)
                        continue
                    seen_at.pop(other.name, None)
                    try:
                        await node.fabric.connect(other.name, other.fabric.addresses, timeout_s=5)
                    except (UnreachableError, LinkClosedError, ClosedError):
                        continue
            await trio.sleep(0.5)

    async def _connect(self, node: Node, peer_id: str) -> Link:
        """Return a link to ``peer_id``, once that wants one as well."""
        pair = cast(tuple[str, str], tuple(sorted((node.name, peer_id))))
        waiting = self._wanted.pop(pair, None)
        if waiting is None:
            mine = self._wanted[pair] = _Wanted()
            try:
                with trio.fail_after(limits.LINK_HANDSHAKE_TIMEOUT_S):
                    await mine.made.wait()
            except trio.TooSlowError:
                raise UnreachableError(f"{peer_id} does not want a link") from None
            finally:
                if self._wanted.get(pair) is mine:
                    del self._wanted[pair]
            assert mine.link is not None
            link = mine.link
        else:
            link, waiting.link = memory_link_pair(
                node.name, peer_id, delay_s=self._delay_s, rate_bytes_per_s=self._rate
            )
            waiting.made.set()
        node.links.append(link)
        await trio.lowlevel.checkpoint()
        return link

    async def _train(self, node: Node) -> None:
        assert node.follower is not None
        await node.follower.entered.wait()
        synchronizer = Synchronizer(cast(Any, _MeshOf(node)))
        weights, step = np.zeros(ELEMENTS), 0
        try:
            while True:
                try:
                    done = await synchronizer.run(weights, step, on_drift="raise", check=False, timeout_s=200)
                except DivergenceError as error:
                    # All who held the state died before a newcomer had all of it: once in some thousand worlds.
                    if not str(error).startswith("all who held the state are lost"):
                        raise
                    self.note(f"{node.name} begins anew: {error}")
                    weights[:], step = 0.0, 0
                    continue
                self.exercised.synchronized += done.bytes_received > 0
                step = done.step
                if node.leaving:
                    self.note(f"{node.name} leaves")
                    node.group.close()
                    await node.service.leave()
                    node.scope.cancel()
                    return
                if await self._reduce(node, weights, step):
                    step += 1
                    node.steps_after += self._quiet
                    stepped, self._stepped = self._stepped, trio.Event()
                    stepped.set()
                await trio.sleep(self._compute_s * self.random.uniform(0.5, 1.5))
        except (ClosedError, OutcomeUnknownError, CollectiveTimeoutError) as error:
            self.note(f"{node.name} is out: {type(error).__name__}: {error}")
            if isinstance(error, CollectiveTimeoutError):
                self._break(f"{node.name} has waited in vain: {error}")
            self._end(node)
            self._come_back(node, error)

    def _come_back(self, node: Node, error: Exception) -> None:
        """What ends a member need not end its process, which may be a member again, or go on by itself."""
        if isinstance(error, MeshMergedError):
            self.exercised.merged += 1
            lineage, into = node.group.lineage, node.merged_into
            assert into is not None
            self._dissolved[lineage] = into
            if self._dissolved.get(into) == lineage:
                self._break("two meshes have dissolved, each because of the other")
            self._nursery.start_soon(self._start, NEVER)
        elif isinstance(error, QuorumLostError) and self.random.random() < self._rates["fork"]:
            self.exercised.forks += 1
            self._nursery.start_soon(self._start, 1)
        else:
            self.exercised.excluded += 1

    async def _reduce(self, node: Node, weights: np.ndarray, step: int) -> bool:
        """One step; whether it went well."""
        data = np.full(ELEMENTS, share(node.service.member, step), np.int64)
        group = node.group
        gives_up = not self._quiet and self.random.random() < self._rates["cancel"] * 0.02
        try:
            await group.all_reduce(data, timeout_s=self.random.uniform(0.001, 0.1) if gives_up else 150)
        except (PeerLostError, CollectiveAbortedError, CollectiveTimeoutError) as error:
            if isinstance(error, CollectiveTimeoutError) and not gives_up:
                raise
            self.exercised.cancels += gives_up
            self.exercised.lost_calls += 1
            if data.min() != data.max() or data[0] != share(node.service.member, step):
                self._break(f"{node.name} raised {type(error).__name__}, and its array was written to")
            return False
        outcome = group.last_outcome
        assert outcome is not None
        members = group.shown[1]
        contributors = tuple(cast(Member, members[rank]) for rank in outcome.contributors)
        self._check(node, outcome.operation, data, contributors, step)
        weights += data
        self._compare_states(node, outcome.operation, weights)
        return True

    def _compare_states(self, node: Node, operation: int, weights: np.ndarray) -> None:
        """Whoever takes part in an operation has the state of all others after it."""
        state = weights.tobytes()
        if self._states.setdefault((node.group.lineage, operation), state) != state:
            self._break(f"{node.name} has another state than others after operation {operation}")

    def _check(self, node: Node, operation: int, data: np.ndarray, contributors: Sequence[Member], step: int) -> None:
        self.exercised.reductions += 1
        self._views.add((node.group.lineage, node.group.shown[0]))
        self.exercised.views = len(self._views)
        expected = sum(share(member, step) for member in contributors)
        self.note(f"{node.name} step {step} operation {operation}: {data[0]} of {len(contributors)}")
        if data.min() != data.max() or data[0] != expected:
            self._break(f"{node.name} got {data.min()} to {data.max()} in operation {operation}, not {expected}")
        result = (data.tobytes(), tuple(contributors))
        if self._results.setdefault((node.group.lineage, operation), result) != result:
            self._break(f"operation {operation} has ended differently on {node.name}")

    # --- Faults ----------------------------------------------------------------------------------

    async def _do_damage(self) -> None:
        await trio.sleep(self.random.uniform(0.0, 3.0))
        deadline = trio.current_time() + FAULTS_UNTIL_S
        while trio.current_time() < deadline:
            await trio.sleep(self.random.uniform(0.1, 0.8))
            await self._begin_anew_if_over()
            alive = [node for node in self._nodes if node.alive]
            for name, damage in (("crash", self._crash), ("drop", self._drop_link), ("leave", self._leave)):
                if self.random.random() < self._rates[name] * 0.15:
                    damage(self.random.choice(alive))
            if self.random.random() < self._rates["pause"] * 0.15:
                self._nursery.start_soon(self._pause, self.random.choice(alive))
            if self.random.random() < self._rates["partition"] * 0.1:
                await self._partition(alive)
            room = len([node for node in self._nodes if node.alive]) < self.count + 2
            if room and self.random.random() < self._rates["join"] * 0.3:
                self.exercised.joins += 1
                await self._start(NEVER)
        self._network.heal()
        self._pauses.resume_all()
        for node in self._nodes:
            for link in node.links:
                link.heal()
        self._quiet = True
        self.note("faults stop")
        while True:
            # The last fault may have left too few.
            await self._begin_anew_if_over()
            await trio.sleep(10.0)

    async def _begin_anew_if_over(self) -> None:
        """Where no member is left, those who wait to be taken in give up, and a new mesh begins."""
        alive = [node for node in self._nodes if node.alive]
        modest = sorted(node.min_peers for node in alive)
        may_form = any(least <= count for count, least in enumerate(modest, start=1))
        if may_form or any(node.is_member for node in alive):
            return
        self.note("the mesh is over; another one begins")
        for node in alive:
            self._end(node)
        await self._begin()

    async def _pause(self, node: Node) -> None:
        if node.alive and not self._quiet and self._pauses.pause(node.name):
            self.note(f"{node.name} stops running")
            self.exercised.pauses += 1
            await trio.sleep(self.random.choice([0.2, 2.0, 8.0, 20.0]))
            self.note(f"{node.name} goes on")
            self._pauses.resume(node.name)

    def _end(self, node: Node) -> None:
        self._pauses.resume(node.name)
        node.alive = False
        for link in node.links:
            link.drop()
        node.scope.cancel()

    def _crash(self, node: Node) -> None:
        self.note(f"{node.name} crashes")
        self.exercised.crashes += 1
        self._network.kill(node.name)
        self._end(node)

    def _drop_link(self, node: Node) -> None:
        standing = [link for link in node.links if not link.closed]
        if standing:
            link = self.random.choice(standing)
            self.note(f"{node.name} loses its link to {link.peer_id}")
            self.exercised.link_losses += 1
            link.drop()

    def _leave(self, node: Node) -> None:
        node.leaving = True
        self.exercised.leaves += 1

    async def _partition(self, alive: Sequence[Node]) -> None:
        side = {node.name for node in alive if self.random.random() < 0.4}
        rest = {node.name for node in alive} - side
        if not side or not rest:
            return
        if self.random.random() < 0.3:
            # All others reach both.
            side, rest = {min(side)}, {min(rest)}
        self.note(f"{sorted(side)} and {sorted(rest)} are cut off from each other")
        self.exercised.partitions += 1
        self._network.partition(side, rest)
        sides = (side, rest), (rest, side)
        cut = [
            link for node in alive for link in node.links if any(node.name in a and link.peer_id in b for a, b in sides)
        ]
        for link in cut:
            link.partition()
        await trio.sleep(self.random.choice([0.2, 1.0, 3.0, 20.0]))
        self._network.heal()
        for link in cut:
            link.heal()
        self.note("and are there again")


class _MeshOf:
    """What a synchroniser needs of a mesh."""

    def __init__(self, node: Node) -> None:
        self._follower = node.follower
        self._node = SimpleNamespace(membership=node.service)
        self._group = node.group


def share(member: Member, step: int) -> int:
    """Return what a member puts into the sum of a step."""
    return int.from_bytes(blake2b(member.incarnation + step.to_bytes(8, "big"), digest_size=4).digest(), "big")
