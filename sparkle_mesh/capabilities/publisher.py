"""Keeps this process's capability record at those who are to hold it, while the process lives.

Each ``limits.CAPABILITY_RENEW_S`` the holders are asked to keep it for another lifetime, in a few bytes; where it is
not held any more, or its holders have changed, it is stored. A process that dies renews nothing, and is forgotten.
Where some holders of a key have no room, the record goes under the key below it as well; where most have none, there
alone (see :mod:`.labels`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

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
        # Who holds it under which keys, as far as is known.
        self._holders: dict[PeerId, tuple[PeerAddress, frozenset[bytes]]] = {}
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
        while True:
            self._hurry = trio.Event()
            await self._publish()
            with trio.move_on_after(limits.CAPABILITY_RENEW_S * self._entropy.uniform(0.75, 1.25)):
                await self._hurry.wait()
                # Newcomers come in crowds: once for all of them.
                await trio.sleep(limits.CAPABILITY_SETTLE_S)

    async def withdraw(self) -> None:
        """Publish no more, and ask all holders to forget the record."""
        self._devices = None
        async with trio.open_nursery() as nursery:
            for peer, _ in self._holders.values():
                nursery.start_soon(self._tell, peer, Withdraw())
        self._holders.clear()

    async def _publish(self) -> None:
        record = self.own_record()
        if record is None:
            return
        if record != self._record or self._signed is None:
            self._sign(record, self.sequence)
        now = trio.current_time()
        # Not all at once that have started together.
        if now - self._looked_at >= self._republish_s * self._entropy.uniform(0.75, 1.25):
            if now - self._looked_at < float("inf"):
                self._republish_s = min(2 * self._republish_s, limits.CAPABILITY_REPUBLISH_S)
            self._looked_at = now
            # There may be room again higher up; where there is none, that is remembered there.
            self._place(dict.fromkeys(self._depths, (0,)))
            self._holders.clear()
            await self._look_for_holders(self._keys)
        await self._keep(list(self._holders.values()))
        while new := self._place({label: self._deeper(label, depths) for label, depths in self._depths.items()}):
            found = await self._look_for_holders(new)
            await self._keep(list(found.values()))

    def _key(self, label: str, depth: int) -> bytes:
        return self._secrets.locate(label_below(label, bits_of(self._identity.peer_id, depth)))

    def _deeper(self, label: str, depths: tuple[int, ...]) -> tuple[int, ...]:
        """Return at which depths to publish under ``label``, as its holders at the last of ``depths`` have room."""
        deepest, key = depths[-1], self._key(label, depths[-1])
        holders = [peer_id for peer_id, (_, keys) in self._holders.items() if key in keys]
        full_count = sum(peer_id in self._full.get(key, set()) for peer_id in holders)
        if not full_count or deepest == limits.CAPABILITY_DEPTH_MAX_COUNT:
            return depths
        # Whoever searches asks about the same holders, but not quite: so few of them do not suffice.
        return (*(depths if 2 * full_count <= len(holders) else depths[:-1]), deepest + 1)

    def _place(self, depths: dict[str, tuple[int, ...]]) -> frozenset[bytes]:
        """Publish at these depths from now on; return the keys that are new."""
        before = self._keys
        self._depths = depths
        self._keys = frozenset(self._key(label, depth) for label, some in depths.items() for depth in some)
        self._full = {key: peers for key, peers in self._full.items() if key in self._keys}
        kept = {peer_id: (peer, keys & self._keys) for peer_id, (peer, keys) in self._holders.items()}
        self._holders = {peer_id: (peer, keys) for peer_id, (peer, keys) in kept.items() if keys}
        return self._keys - before

    async def _keep(self, holders: list[tuple[PeerAddress, frozenset[bytes]]]) -> None:
        async with trio.open_nursery() as nursery:
            for peer, keys in holders:
                nursery.start_soon(self._keep_at, peer, keys)

    def _sign(self, record: CapabilityRecord, above: int) -> None:
        """Sign ``record`` under a number above ``above``; the clock makes it higher than before a restart."""
        self.sequence = max(above + 1, int(self._clock.wall_time() * 1000))
        self._record = record
        self._signed = sign_record(record, self._identity, self._secrets, sequence=self.sequence, entropy=self._entropy)
        labels = index_labels(record.role, record.devices)
        if labels != self._depths.keys():
            self._place({label: self._depths.get(label, (0,)) for label in sorted(labels)})
            self._looked_at = float("-inf")

    async def _look_for_holders(self, keys: Iterable[bytes]) -> dict[PeerId, tuple[PeerAddress, frozenset[bytes]]]:
        """Find who is to hold the record under ``keys``, beside those who hold it under others; return them."""
        holders: dict[PeerId, tuple[PeerAddress, set[bytes]]] = {}

        async def look(key: bytes) -> None:
            for peer in await self._holders_of(key):
                holders.setdefault(peer.peer_id, (peer, set()))[1].add(key)

        async with trio.open_nursery() as nursery:
            for key in sorted(keys):
                nursery.start_soon(look, key)
        found = {peer_id: (peer, frozenset(keys)) for peer_id, (peer, keys) in holders.items()}
        for peer_id, (peer, new) in found.items():
            known = self._holders.get(peer_id)
            self._holders[peer_id] = (peer, new if known is None else new | known[1])
        return found

    async def _keep_at(self, peer: PeerAddress, keys: frozenset[bytes]) -> None:
        """Have ``peer`` hold the record under ``keys`` for another lifetime."""
        assert self._signed is not None
        signed = self._signed
        renewed = await self._tell(peer, Renew(sequence=signed.sequence, keys=tuple(sorted(keys))))
        if not isinstance(renewed, Done):
            return
        for key in keys - frozenset(renewed.missing):
            self._full.get(key, set()).discard(peer.peer_id)
        if not renewed.missing:
            return
        stored = await self._tell(peer, Store(record=signed, keys=renewed.missing))
        if isinstance(stored, Done):
            for key in renewed.missing:
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
            logger.info("peer %s does not hold this machine's record: %s", peer.peer_id, stored.reason)

    async def _tell(self, peer: PeerAddress, question: Question) -> Answer | None:
        try:
            return await self._ask(peer, question)
        except SparkleError as error:
            logger.debug("a holder cannot be told: %s", error)
            self._holders.pop(peer.peer_id, None)
            # Others are to hold it in its place.
            self._looked_at = float("-inf")
            return None
