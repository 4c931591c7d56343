"""Keeps this process's capability record at those who are to hold it, while the process lives.

Holders keep it while they hear its publisher, on the connection that stands between them: the pings of membership
suffice. Who has not heard of this process for long is told, and now and then each is told what it is to hold, in a few
bytes; where it is not held any more, or its holders have changed, it is stored. A process that dies is forgotten.
Where some holders of a key have no room, the record goes under the key below it as well; where most have none, there
alone (see :mod:`.labels`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from sparkle_mesh import limits
from sparkle_mesh.capabilities.labels import bits_of, index_labels, label_below
from sparkle_mesh.capabilities.messages import Answer, Done, Question, Refused, Renew, Store, Withdraw
from sparkle_mesh.capabilities.records import CapabilityRecord, Secrets, SignedRecord, sign_record
from sparkle_mesh.clock import Clock, Entropy
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import Address, PeerId
from sparkle_mesh.wire import PeerAddress

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Holder:
    """Who is to hold the record, under which keys."""

    peer: PeerAddress
    keys: frozenset[bytes]
    #: When it last was told so, and when both last heard of each other.
    told_at: float = float("-inf")
    heard_at: float = float("-inf")

    def is_due(self, now: float, renew_s: float) -> bool:
        return now - self.told_at >= renew_s or now - self.heard_at >= limits.CAPABILITY_UNHEARD_S


@dataclass(slots=True)
class _Told:
    """Who may hold the record, whether it is to or not."""

    peer: PeerAddress
    #: When it last was heard: after a lifetime without it holds nothing any more.
    heard_at: float
    #: When it may be asked to forget the record, if it is not to hold it.
    release_at: float = 0.0


class Publisher:
    """Publishes one record.

    Parameters
    ----------
    identity, secrets
        Who signs, and for which mesh.
    host_id, role, software, addresses
        What the record tells beside the devices; the addresses as they are when it is made.
    holders_of
        Returns who is to hold what is stored under a key.
    ask
        Asks one of them, or raises SparkleError.
    """

    def __init__(
        self,
        identity: Identity,
        secrets: Secrets,
        *,
        host_id: bytes,
        role: str,
        software: str,
        addresses: Callable[[], Sequence[Address]],
        holders_of: Callable[[bytes], Awaitable[list[PeerAddress]]],
        ask: Callable[[PeerAddress, Question], Awaitable[Answer]],
        entropy: Entropy,
        clock: Clock,
    ) -> None:
        self._identity, self._secrets, self._entropy, self._clock = identity, secrets, entropy, clock
        self._host_id, self._role, self._software = host_id, role, software
        self._addresses, self._holders_of, self._ask = addresses, holders_of, ask
        self._devices: tuple[DeviceInfo, ...] | None = None
        self._record: CapabilityRecord | None = None
        self._signed: SignedRecord | None = None
        # How deep it lies under each label, and under which keys that is.
        self._depths: dict[str, tuple[int, ...]] = {}
        self._keys: frozenset[bytes] = frozenset()
        # Who has no room, by key.
        self._full: dict[bytes, set[PeerId]] = {}
        self._holders: dict[PeerId, _Holder] = {}
        self._told: dict[PeerId, _Told] = {}
        # Under which keys they were to hold it before the last look. They do until the next one: between its former
        # place and the next, whoever searches would miss it.
        self._former: dict[PeerId, frozenset[bytes]] = {}
        self._looked_at = float("-inf")
        # Soon at first: while a mesh grows, who is closest to a key changes, and nobody tells.
        self._republish_s = min(limits.CAPABILITY_REPUBLISH_MIN_S, limits.CAPABILITY_REPUBLISH_S)
        self._hurry = trio.Event()
        #: Of the record that is published; 0 before there is one.
        self.sequence = 0

    @property
    def keys(self) -> frozenset[bytes]:
        """Under which the record is published."""
        return self._keys

    def offer(self, devices: Sequence[DeviceInfo]) -> None:
        """Publish that the machine has ``devices``, from now on."""
        self._devices = tuple(devices)[: limits.DEVICES_PER_RECORD_MAX_COUNT]
        self.hurry()

    def hurry(self) -> None:
        """Look for holders now: there may be others than before."""
        self._looked_at = float("-inf")
        self._hurry.set()

    def heard(self, peer_id: PeerId, now: float) -> bool:
        """``peer_id`` and this process hear each other; return whether it is to hold the record."""
        if peer_id in self._told:
            self._told[peer_id].heard_at = now
        holder = self._holders.get(peer_id)
        if holder is None:
            return False
        if now - holder.heard_at >= limits.CAPABILITY_UNHEARD_S:
            # It may have let go of the record meanwhile.
            holder.told_at = float("-inf")
        holder.heard_at = now
        return True

    def gone(self, peer_id: PeerId) -> None:
        """``peer_id`` may not hold any more what it held: it is not connected, or says so itself."""
        if peer_id in self._holders:
            self._holders[peer_id].told_at = float("-inf")

    def own_record(self) -> CapabilityRecord | None:
        """Return what is told, as of now; None before :meth:`offer`."""
        if self._devices is None:
            return None
        return CapabilityRecord(
            host_id=self._host_id,
            role=self._role,
            software=self._software,
            addresses=tuple(self._addresses())[: limits.ADDRESSES_PER_PEER_MAX_COUNT],
            devices=self._devices,
        )

    async def run(self) -> None:
        """Publish and renew until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._renew_forever)
            while True:
                self._hurry = trio.Event()
                await self._publish()
                with trio.move_on_after(limits.CAPABILITY_LOOK_S * self._entropy.uniform(0.75, 1.25)):
                    await self._hurry.wait()
                    # Newcomers come in crowds: once for all of them.
                    await trio.sleep(limits.CAPABILITY_SETTLE_S)

    async def _renew_forever(self) -> None:
        """Renew in time, however long it takes to find other holders."""
        while True:
            await trio.sleep(limits.CAPABILITY_LOOK_S * self._entropy.uniform(0.75, 1.25))
            await self._renew()

    async def _renew(self) -> None:
        now, renew_s = trio.current_time(), limits.CAPABILITY_RENEW_S * self._entropy.uniform(0.75, 1.25)
        await self._keep([peer_id for peer_id, holder in self._holders.items() if holder.is_due(now, renew_s)])

    async def withdraw(self) -> None:
        """Publish no more, and ask all holders to forget the record."""
        self._devices = None
        async with trio.open_nursery() as nursery:
            for told in self._told.values():
                nursery.start_soon(self._release, told)
        self._holders.clear()

    async def _publish(self) -> None:
        record = self.own_record()
        if record is None:
            return
        if record != self._record or self._signed is None:
            self._sign(record, self.sequence)
        await self._release_former()
        now = trio.current_time()
        # Not all at once that have started together.
        if now - self._looked_at >= self._republish_s * self._entropy.uniform(0.75, 1.25):
            if now - self._looked_at < float("inf"):
                self._republish_s = min(2 * self._republish_s, limits.CAPABILITY_REPUBLISH_S)
            self._looked_at = now
            # There may be room again higher up; where there is none, that is remembered there.
            depths: dict[str, tuple[int, ...]]
            depths = {label: (self._depth_above(some[0]),) for label, some in self._depths.items()}
            await self._begin_at(depths)
            if roomy := {label for label, (top, *_) in depths.items() if top and not self._full_at(label, top)}:
                await self._begin_at({label: (0,) if label in roomy else some for label, some in depths.items()})
        await self._renew()
        while new := self._place({label: self._deeper(label, depths) for label, depths in self._depths.items()}):
            await self._keep(self._take_on(await self._look_for_holders(new)))

    async def _release_former(self) -> None:
        """Have those forget the record who are not to hold it any more, or under some keys no more."""
        now = trio.current_time()
        for peer_id in self._former.keys() & self._holders.keys():
            if self._former[peer_id] - self._holders[peer_id].keys:
                self._holders[peer_id].told_at = float("-inf")
        self._former.clear()
        for peer_id, told in list(self._told.items()):
            if peer_id not in self._holders and now - told.heard_at >= limits.CAPABILITY_LIFETIME_S:
                del self._told[peer_id]
        async with trio.open_nursery() as nursery:
            for peer_id in self._told.keys() - self._holders.keys():
                if now >= self._told[peer_id].release_at:
                    nursery.start_soon(self._release, self._told[peer_id])

    def _depth_above(self, depth: int) -> int:
        """Return where to begin for a record that lies at ``depth``: one level higher, or two with half the chance, …

        So all levels are looked at again and again, and the higher ones not by everybody.
        """
        while depth > 0:
            depth -= 1
            if self._entropy.uniform(0.0, 1.0) < 0.5:
                break
        return depth

    async def _begin_at(self, depths: dict[str, tuple[int, ...]]) -> None:
        """Have the record held at these depths, by whoever is to hold it there now."""
        found = await self._look_for_holders(self._keys_at(depths))
        # Until then those before are told as ever.
        for peer_id, holder in self._holders.items():
            self._former[peer_id] = self._former.get(peer_id, frozenset()) | holder.keys
        self._place(depths)
        self._holders.clear()
        await self._keep(self._take_on(found))

    def _key(self, label: str, depth: int) -> bytes:
        return self._secrets.locate(label_below(label, bits_of(self._identity.peer_id, depth)))

    def _keys_at(self, depths: dict[str, tuple[int, ...]]) -> frozenset[bytes]:
        return frozenset(self._key(label, depth) for label, some in depths.items() for depth in some)

    def _deeper(self, label: str, depths: tuple[int, ...]) -> tuple[int, ...]:
        """Return at which depths to publish under ``label``, as its holders at the last of ``depths`` have room."""
        deepest = depths[-1]
        full_count = self._full_at(label, deepest)
        if not full_count or deepest == limits.CAPABILITY_DEPTH_MAX_COUNT:
            return depths
        # Whoever searches asks about the same holders, but not quite: so few of them do not suffice.
        return (*(depths if 2 * full_count <= len(self._holders_at(label, deepest)) else depths[:-1]), deepest + 1)

    def _holders_at(self, label: str, depth: int) -> list[PeerId]:
        key = self._key(label, depth)
        return [peer_id for peer_id, holder in self._holders.items() if key in holder.keys]

    def _full_at(self, label: str, depth: int) -> int:
        """Return how many of the holders there have no room."""
        return len(self._full.get(self._key(label, depth), set()).intersection(self._holders_at(label, depth)))

    def _place(self, depths: dict[str, tuple[int, ...]]) -> frozenset[bytes]:
        """Publish at these depths from now on; return the keys that are new."""
        before = self._keys
        self._depths = depths
        self._keys = self._keys_at(depths)
        self._full = {key: peers for key, peers in self._full.items() if key in self._keys}
        for holder in self._holders.values():
            if not holder.keys <= self._keys:
                holder.keys &= self._keys
                holder.told_at = float("-inf")
        self._holders = {peer_id: holder for peer_id, holder in self._holders.items() if holder.keys}
        return self._keys - before

    async def _keep(self, holders: Iterable[PeerId]) -> None:
        async with trio.open_nursery() as nursery:
            for peer_id in holders:
                if peer_id in self._holders:
                    nursery.start_soon(self._keep_at, self._holders[peer_id])

    def _sign(self, record: CapabilityRecord, above: int) -> None:
        """Sign ``record`` under a number above ``above``; the clock makes it higher than before a restart."""
        self.sequence = max(above + 1, int(self._clock.wall_time() * 1000))
        self._record = record
        self._signed = sign_record(record, self._identity, self._secrets, sequence=self.sequence, entropy=self._entropy)
        for holder in self._holders.values():
            holder.told_at = float("-inf")
        labels = index_labels(record.role, record.devices)
        if labels != self._depths.keys():
            self._place({label: self._depths.get(label, (0,)) for label in sorted(labels)})
            self._looked_at = float("-inf")

    def _take_on(self, found: dict[PeerId, _Holder]) -> list[PeerId]:
        """These are to hold the record, too; return who they are."""
        for peer_id, holder in found.items():
            # Of those keys that it still has.
            self._holders.setdefault(peer_id, _Holder(holder.peer, frozenset())).keys |= holder.keys & self._keys
        return list(found)

    async def _look_for_holders(self, keys: Iterable[bytes]) -> dict[PeerId, _Holder]:
        """Find who is to hold the record under ``keys``."""
        found: dict[PeerId, _Holder] = {}

        async def look(key: bytes) -> None:
            for peer in await self._holders_of(key):
                found.setdefault(peer.peer_id, _Holder(peer, frozenset())).keys |= {key}

        async with trio.open_nursery() as nursery:
            for key in sorted(keys):
                nursery.start_soon(look, key)
        return found

    async def _keep_at(self, holder: _Holder) -> None:
        """Have ``holder`` hold the record for another lifetime."""
        assert self._signed is not None
        signed, peer, keys = self._signed, holder.peer, holder.keys
        self._told[peer.peer_id] = _Told(peer, trio.current_time())
        renewed = await self._tell(peer, Renew(sequence=signed.sequence, keys=self._with_former(peer.peer_id, keys)))
        if not isinstance(renewed, Done):
            return
        missing = tuple(key for key in renewed.missing if key in keys)
        for key in keys - frozenset(missing):
            self._full.get(key, set()).discard(peer.peer_id)
        stored = await self._tell(peer, Store(record=signed, keys=missing)) if missing else None
        if self._signed is signed:
            holder.told_at = holder.heard_at = trio.current_time()
        if isinstance(stored, Done):
            for key in missing:
                has_room = key not in stored.missing
                full = self._full.setdefault(key, set())
                (full.discard if has_room else full.add)(peer.peer_id)
        if not isinstance(stored, Refused):
            return
        if stored.held_sequence is not None and self._signed is signed and self._record is not None:
            # Of a run of this identity before, whose clock was ahead.
            self._sign(self._record, stored.held_sequence)
            self._hurry.set()
        else:
            # It may have room, or time, before the next renewal is due.
            holder.told_at = trio.current_time() - limits.CAPABILITY_RENEW_S + limits.CAPABILITY_UNHEARD_S
            logger.info("peer %s does not hold this machine's record: %s", peer.peer_id, stored.reason)

    def _with_former(self, peer_id: PeerId, keys: frozenset[bytes]) -> tuple[bytes, ...]:
        """Return ``keys``, and those under which ``peer_id`` held the record before, as far as a message takes them."""
        former = self._former.get(peer_id, frozenset()) - keys
        return tuple(sorted(keys)) + tuple(sorted(former))[: limits.CAPABILITY_KEYS_MAX_COUNT - len(keys)]

    async def _tell(self, peer: PeerAddress, question: Question) -> Answer | None:
        try:
            return await self._ask(peer, question)
        except SparkleError as error:
            logger.debug("a holder cannot be told: %s", error)
            self._holders.pop(peer.peer_id, None)
            # Others are to hold it in its place.
            self._looked_at = float("-inf")
            return None

    async def _release(self, told: _Told) -> None:
        """Ask one to forget the record; one that cannot be told is asked again while it is heard."""
        told.release_at = trio.current_time() + limits.CAPABILITY_UNHEARD_S
        try:
            await self._ask(told.peer, Withdraw())
        except SparkleError as error:
            logger.debug("a former holder cannot be told: %s", error)
            return
        peer_id = told.peer.peer_id
        # Unless it was told to hold it again meanwhile.
        if self._told.get(peer_id) is told:
            del self._told[peer_id]
