"""Whom a process is connected to, and whom it would be: a pure machine that bounds the degree of a mesh's graph.

Trainers need connections to each other, all of them: their views do. Nodes need no more than that the graph hangs
together, that nobody can cut one of them off, and that the DHT works. So a node dials whoever it hears of until it has
``limits.NODE_DEGREE_TARGET_COUNT`` connections, and lets some go beyond ``limits.NODE_DEGREE_MAX_COUNT``, not counting
those with which records are renewed: to make them anew each time would cost more. It keeps

- those that its user has named, and relays and those whom it relays for;
- those that are closest to it in the space of keys: through them halves of a mesh that meet find all of each other;
- some that it has chosen itself, at random, and the oldest of those that came to it: whoever comes later, with
  however many names, displaces none of them.

Of the rest goes who is of the most crowded public network, then who came last. A trainer keeps connections to a few
nodes, those of its own host first. Whoever is let go is told of others before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sparkle_mesh import limits
from sparkle_mesh.discovery.routing_table import distance, key_of_peer
from sparkle_mesh.fabric.interface import Address, PeerId
from sparkle_mesh.fabric.networks import network_of

_TRAINER = "trainer"


@dataclass(slots=True)
class Neighbour:
    """One peer that is connected.

    Attributes
    ----------
    distance
        From this process, in the space of keys.
    chosen
        Whether this process dialed it for its own sake.
    asked
        Whether this process connected to it only to ask it something.
    introduced
        Whether it has shown that it is of the mesh; before that its role is hearsay, and it is not let go.
    used_at
        When the DHT used the connection last.
    """

    peer_id: PeerId
    distance: int
    role: str
    since: float
    chosen: bool
    asked: bool
    configured: bool
    network: str | None
    same_host: bool = False
    introduced: bool = False
    used_at: float = float("-inf")

    def is_busy(self, now: float) -> bool:
        """Whether the DHT uses it."""
        return now - self.used_at < limits.DEGREE_BUSY_S


@dataclass(frozen=True, slots=True)
class Wish:
    """Whom to dial, as things stand: ``anybody`` up to ``room`` of them; and who is closer than ``nearer_than``."""

    room: int
    nearer_than: int
    all_trainers: bool
    trainers_fill_room: bool

    def takes(self, role: str, hearsay: bool, how_far: int) -> bool:
        """Whether a peer of that role and distance is wanted; ``hearsay`` if it was only named by others."""
        if self.all_trainers and (role == _TRAINER or (not role and not hearsay)):
            return True
        if role == _TRAINER and not self.trainers_fill_room:
            return False
        return self.room > 0 or how_far < self.nearer_than

    def takes_beyond_room(self, role: str, hearsay: bool, how_far: int) -> bool:
        """Whether it is wanted even if there was no room."""
        return Wish(0, self.nearer_than, self.all_trainers, False).takes(role, hearsay, how_far)


class Degree:
    """The connections of a process.

    Parameters
    ----------
    me
        This process's peer id.
    role
        What it is: ``"node"``, ``"trainer"``, or empty for one that wants everybody.
    is_needed
        Whether a peer is to stay connected for another reason: it is a relay of this process, or has this one as its.
    """

    def __init__(self, me: PeerId, role: str, *, is_needed: Callable[[PeerId], bool] = lambda peer_id: False) -> None:
        self._is_needed = is_needed
        self._key = key_of_peer(me)
        self._is_trainer = role == _TRAINER
        self._is_bounded = role != ""
        self._neighbours: dict[PeerId, Neighbour] = {}
        self._nearer_than: int | None = None

    def __len__(self) -> int:
        return len(self._neighbours)

    def distance_to(self, peer_id: PeerId) -> int:
        """Return how far ``peer_id`` is in the space of keys."""
        return distance(self._key, key_of_peer(peer_id))

    def neighbours(self) -> Iterable[Neighbour]:
        """Return all; the caller must not change them."""
        return self._neighbours.values()

    # --- What happened ----------------------------------------------------------------------------

    def came(
        self,
        peer_id: PeerId,
        now: float,
        *,
        role: str = "",
        chosen: bool = False,
        asked: bool = False,
        configured: bool = False,
        remote_address: Address | None = None,
    ) -> None:
        """A connection to ``peer_id`` stands; see :class:`Neighbour`."""
        if peer_id not in self._neighbours:
            how_far, network = self.distance_to(peer_id), network_of(remote_address)
            self._neighbours[peer_id] = Neighbour(peer_id, how_far, role, now, chosen, asked, configured, network)
            self._nearer_than = None

    def introduced(self, peer_id: PeerId, role: str, *, same_host: bool) -> None:
        """``peer_id`` has shown that it is of the mesh, and said what it is."""
        neighbour = self._neighbours.get(peer_id)
        if neighbour is not None:
            neighbour.role, neighbour.same_host, neighbour.introduced = role, same_host, True
            self._nearer_than = None

    def used(self, peer_id: PeerId, now: float) -> None:
        """The DHT has asked ``peer_id``, or answered it."""
        neighbour = self._neighbours.get(peer_id)
        if neighbour is not None:
            neighbour.used_at = now

    def went(self, peer_id: PeerId) -> None:
        """The connection is gone."""
        if self._neighbours.pop(peer_id, None) is not None:
            self._nearer_than = None

    # --- What to do -------------------------------------------------------------------------------

    def wish(self, dialing_count: int) -> Wish:
        """Return whom to dial while ``dialing_count`` dials are under way."""
        if not self._is_bounded:
            return Wish(limits.CONNECTIONS_MAX_COUNT, -1, all_trainers=False, trainers_fill_room=True)
        if self._is_trainer:
            room = limits.TRAINER_NODES_TARGET_COUNT - len(self._nodes()) - dialing_count
            return Wish(room, -1, all_trainers=True, trainers_fill_room=True)
        chosen_count = sum(neighbour.chosen for neighbour in self._nodes())
        room = limits.NODE_DEGREE_TARGET_COUNT - len(self._neighbours) - dialing_count
        # However many came by themselves, or are asked: some are to be chosen here.
        choices = limits.NODE_DEGREE_CHOSEN_COUNT - chosen_count - dialing_count
        return Wish(max(room, choices), self._nearness(), all_trainers=False, trainers_fill_room=room > 0)

    def surplus(self, now: float) -> list[PeerId]:
        """Return whom to let go, after they were told of others."""
        if not self._is_bounded:
            return []
        if self._is_trainer:
            return self._beyond(self._nodes(), limits.TRAINER_NODES_MAX_COUNT, now)
        trainers = [n for n in self._neighbours.values() if n.introduced and n.role == _TRAINER]
        done = self._done_with(now)
        nodes = [neighbour for neighbour in self._nodes() if neighbour.peer_id not in done]
        return [
            *done,
            *self._beyond(nodes, limits.NODE_DEGREE_MAX_COUNT, now),
            *self._beyond(trainers, limits.NODE_DEGREE_TRAINERS_MAX_COUNT, now),
        ]

    def _nodes(self) -> list[Neighbour]:
        return [neighbour for neighbour in self._neighbours.values() if neighbour.role != _TRAINER]

    def _near(self) -> list[Neighbour]:
        return sorted(self._nodes(), key=lambda neighbour: neighbour.distance)[: limits.NODE_DEGREE_NEAR_COUNT]

    def _nearness(self) -> int:
        if self._nearer_than is None:
            near = self._near()
            self._nearer_than = near[-1].distance if len(near) == limits.NODE_DEGREE_NEAR_COUNT else -1
        return self._nearer_than

    def _kept(self, among: list[Neighbour], now: float) -> set[PeerId]:
        """Return those that stay whoever else comes."""
        oldest = sorted(among, key=lambda neighbour: neighbour.since)
        chosen = [n for n in oldest if n.chosen][: limits.NODE_DEGREE_CHOSEN_COUNT]
        inbound = [n for n in oldest if not n.chosen and not n.asked][: limits.NODE_DEGREE_INBOUND_COUNT]
        near = [] if self._is_trainer else self._near()
        always = [n for n in among if self._is_bound(n) or n.is_busy(now) or (n.same_host and self._crosses_roles(n))]
        return {neighbour.peer_id for group in (chosen, inbound, near, always) for neighbour in group}

    def _is_bound(self, neighbour: Neighbour) -> bool:
        return neighbour.configured or self._is_needed(neighbour.peer_id)

    def _crosses_roles(self, neighbour: Neighbour) -> bool:
        """Whether of the two one is a node and the other a trainer: those of a host belong together."""
        return (neighbour.role == _TRAINER) != self._is_trainer

    def _done_with(self, now: float) -> list[PeerId]:
        """Return those that this process has connected to, and that have served their purpose.

        Who was to be asked something, and was not for a while, if there are as many as is aimed at; who was chosen
        when there were none yet, if there are more than are accepted.
        """
        nodes = self._nodes()
        kept = self._kept(nodes, now)
        idle = [
            neighbour
            for neighbour in nodes
            if (neighbour.asked or neighbour.chosen)
            and neighbour.introduced
            and neighbour.peer_id not in kept
            and now - max(neighbour.used_at, neighbour.since) >= limits.DEGREE_IDLE_S
        ]
        idle.sort(key=lambda neighbour: (neighbour.chosen, neighbour.used_at))
        spare, excess = (
            len(self._neighbours) - bound for bound in (limits.NODE_DEGREE_TARGET_COUNT, limits.NODE_DEGREE_MAX_COUNT)
        )
        return [n.peer_id for count, n in enumerate(idle) if count < (excess if n.chosen else spare)]

    def _beyond(self, among: list[Neighbour], max_count: int, now: float) -> list[PeerId]:
        """Return who is to go so that ``max_count`` are left that are not busy, or those that are kept."""
        excess = sum(not neighbour.is_busy(now) for neighbour in among) - max_count
        over = len(among) - max_count - limits.NODE_DEGREE_BUSY_MAX_COUNT
        if excess <= 0 and over <= 0:
            return []
        kept = self._kept(among, now)
        crowds = Counter(neighbour.network for neighbour in among if neighbour.network is not None)
        ripe = [n for n in among if n.introduced and now - n.since >= limits.DEGREE_GRACE_S]
        ripe.sort(key=lambda n: (crowds[n.network] if n.network else 0, n.asked, n.since), reverse=True)
        loose = [n.peer_id for n in ripe if n.peer_id not in kept][: max(excess, 0)]
        if over > len(loose):
            loose += [n.peer_id for n in ripe if n.peer_id in kept and not self._is_bound(n)][: over - len(loose)]
        return loose
