"""The runner of the mesh's own DHT: tells what this machine offers, holds what others tell, and searches.

Peers come in through :meth:`CapabilityService.admitted`, once they have proven that they are of the mesh; through
them the lookups find the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import trio

from sparkle_mesh import limits
from sparkle_mesh.capabilities.answers import Answers
from sparkle_mesh.capabilities.labels import TRAINERS_LABEL, label_below
from sparkle_mesh.capabilities.messages import Answer, Dropped, Find, Found, HeldRecord, Question
from sparkle_mesh.capabilities.publisher import Publisher
from sparkle_mesh.capabilities.records import CapabilityRecord, Secrets, SignedRecord, open_filed
from sparkle_mesh.capabilities.search import DeviceQuery, FoundDevice, FoundRecord, choose_devices
from sparkle_mesh.capabilities.store import RecordStore
from sparkle_mesh.capabilities.streams import Answerer, Asker
from sparkle_mesh.clock import SYSTEM_CLOCK, SYSTEM_ENTROPY, Clock, Entropy
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.discovery.lookup import Lookup
from sparkle_mesh.discovery.lookup_run import run_lookup
from sparkle_mesh.discovery.routing_table import RoutingTable, distance, key_of_peer
from sparkle_mesh.errors import ProtocolError, SparkleError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import Address, Fabric, PeerId
from sparkle_mesh.wire import PeerAddress

logger = logging.getLogger(__name__)


class CapabilityService:
    """This process's part of the mesh's DHT.

    Parameters
    ----------
    fabric, identity, secrets
        Who this process is, and of which mesh.
    host_id
        Stands for the machine (16 bytes).
    role, software
        What it says of itself.
    offended
        Takes a peer that asked what is no question, or did not seal it for this mesh.
    welcome
        Whether a peer, which is connected, is answered: membership may have shut the door to it.
    heard
        Takes a peer that was named in a lookup, where it is said to listen, ``"exchange"``, and its role if that is
        known.
    used
        Takes a peer with which questions and answers are exchanged: the connection to it is of use.
    """

    def __init__(
        self,
        fabric: Fabric,
        identity: Identity,
        secrets: Secrets,
        *,
        host_id: bytes,
        role: str,
        software: str,
        heard: Callable[[PeerId, Sequence[Address], str, str], object] = lambda *_: None,
        used: Callable[[PeerId], object] = lambda peer_id: None,
        offended: Callable[[PeerId], object] = lambda peer_id: None,
        welcome: Callable[[PeerId], bool] = lambda peer_id: True,
        entropy: Entropy = SYSTEM_ENTROPY,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._fabric, self._secrets, self._entropy = fabric, secrets, entropy
        self._heard, self._used = heard, used
        self._near_came = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._table = RoutingTable(fabric.peer_id)
        self._store = RecordStore(secrets)
        self._answers = Answers(self._table, self._store)
        self._asker = Asker(fabric, secrets, entropy)
        self._answerer = Answerer(fabric, secrets, entropy, self._answer, offended, welcome)
        self._limiter = trio.CapacityLimiter(limits.LOOKUPS_AT_ONCE_MAX_COUNT)
        self._publisher = Publisher(
            identity,
            secrets,
            host_id=host_id,
            role=role,
            software=software,
            addresses=lambda: fabric.addresses,
            holders_of=self._holders_of,
            ask=self._ask_holder,
            entropy=entropy,
            clock=clock,
        )
        #: Records that others handed out and that did not hold, since the start.
        self.forged_count = 0

    @property
    def store(self) -> RecordStore:
        """What this process holds of others; to be read only."""
        return self._store

    @property
    def table(self) -> RoutingTable:
        """Whom this process asks; to be read only."""
        return self._table

    # --- For the node ---------------------------------------------------------------------------

    def offer(self, devices: Sequence[DeviceInfo]) -> None:
        """Tell from now on that this machine has ``devices``."""
        self._publisher.offer(devices)

    def admitted(
        self, peer_id: PeerId, addresses: Iterable[Address], role: Literal["", "node", "trainer"] = ""
    ) -> None:
        """``peer_id`` has proven that it is of the mesh, or answered as only one of the mesh can."""
        known, remote_address = peer_id in self._table, self._fabric.remote_address(peer_id)
        self._table.answered(peer_id, addresses, trio.current_time(), remote_address=remote_address, role=role)
        if not known and peer_id in self._table:
            self._is_new(peer_id)

    def _is_new(self, peer_id: PeerId) -> None:
        """``peer_id`` has come into the table: it may be one to hold records, or lead to others that are near."""
        if any(self._is_among(peer_id, key, limits.CAPABILITY_HOLDERS_COUNT) for key in self._publisher.keys):
            self._publisher.hurry()
        if self._is_among(peer_id, key_of_peer(self._fabric.peer_id), limits.NODE_DEGREE_NEAR_COUNT):
            self._near_came.set()

    def _is_among(self, peer_id: PeerId, key: bytes, count: int) -> bool:
        """Whether ``peer_id`` is among the ``count`` that are closest to ``key``, as far as is known."""
        return any(route.peer_id == peer_id for route in self._table.closest(key, count))

    def gone(self, peer_id: PeerId, *, for_good: bool) -> None:
        """``peer_id`` is no longer connected, though nobody let it go; ``for_good`` if it said that it leaves."""
        self._table.gone(peer_id)
        self._publisher.gone(peer_id)
        if for_good:
            self._store.withdraw(peer_id)

    def is_there(self, peer_id: PeerId) -> None:
        """``peer_id``, who is of the mesh, has said something: its record is kept, and so is this one's at it."""
        now = trio.current_time()
        holds, held = self._publisher.heard(peer_id, now), self._store.heard(peer_id, now)
        if holds or held:
            self._used(peer_id)

    async def find_devices(
        self, query: DeviceQuery, *, timeout_s: float = limits.LOOKUP_TIMEOUT_S
    ) -> list[FoundDevice]:
        """Return the devices of the mesh that fit, this machine's own among them.

        Takes ``timeout_s`` at the most, whoever does not answer: it returns what was found by then.
        """
        records = await self._find_all(query.labels(), timeout_s)
        own = self._publisher.own_record()
        if own is not None:
            records[self._fabric.peer_id] = FoundRecord(self._fabric.peer_id, self._publisher.sequence, own, 0.0)
        return choose_devices(records.values(), query)

    async def find_trainers(self) -> list[PeerAddress]:
        """Return the trainers of the mesh and where they listen, as they say themselves."""
        records = await self._find_all([TRAINERS_LABEL], limits.LOOKUP_TIMEOUT_S)
        return [PeerAddress(found.publisher, found.record.addresses, "trainer") for found in records.values()]

    # --- Running --------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Publish, answer and keep the table fresh until cancelled."""
        self._answerer.start()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._publisher.run)
            nursery.start_soon(self._refresh_forever)
            nursery.start_soon(self._tidy_forever)
            task_status.started()

    async def leave(self) -> None:
        """Ask the holders to forget this process's record; returns within ``limits.CLOSE_TIMEOUT_S``."""
        with trio.move_on_after(limits.CLOSE_TIMEOUT_S) as scope:
            scope.shield = True
            await self._publisher.withdraw()

    async def _tidy_forever(self) -> None:
        while True:
            await trio.sleep(limits.CAPABILITY_TIDY_S)
            now = trio.current_time()
            self._store.expire(now)
            self._answerer.forget_idle(now)
            await self._asker.close_idle(now)

    async def _refresh_forever(self) -> None:
        """Look for this process's own neighbours, soon after one came; now and then for those of some other place."""
        while True:
            self._near_came = trio.Event()
            with trio.move_on_after(limits.ROUTING_REFRESH_S * self._entropy.uniform(0.5, 1.5)) as timer:
                await self._near_came.wait()
                await trio.sleep(limits.ROUTING_NEAR_SETTLE_S * self._entropy.uniform(0.5, 1.5))
            await self._lookup(key_of_peer(self._fabric.peer_id))
            if timer.cancelled_caught:
                if self._entropy.uniform(0.0, 1.0) < 1 / limits.ROUTING_REFRESHES_PER_OTHER_COUNT:
                    await self._lookup(self._entropy.token(32))
            else:
                await trio.sleep(limits.ROUTING_NEAR_PAUSE_S * self._entropy.uniform(0.5, 1.5))

    # --- Questions ------------------------------------------------------------------------------

    def _answer(self, question: Question, sender: PeerId) -> Answer:
        self._used(sender)
        known = sender in self._table
        answer = self._answers.answer(question, sender, self._fabric.remote_address(sender), trio.current_time())
        if not known and sender in self._table:
            self._is_new(sender)
        if isinstance(question, Dropped):
            self._publisher.gone(sender)
        for publisher in self._store.take_displaced():
            if self._nursery is not None and publisher in self._fabric.connected_peers():
                self._nursery.start_soon(self._tell_displaced, publisher)
        return answer

    async def _tell_displaced(self, publisher: PeerId) -> None:
        """It would not notice soon: it is heard, and so believes that its record is held."""
        try:
            await self._asker.ask(PeerAddress(publisher, ()), Dropped())
        except SparkleError as error:
            logger.debug("%s cannot be told that its record made way: %s", publisher, error)

    async def _ask(self, peer: PeerAddress, question: Question) -> Answer:
        try:
            answer = await self._asker.ask(peer, question)
        except SparkleError:
            self._table.failed(peer.peer_id)
            raise
        self._used(peer.peer_id)
        self.admitted(peer.peer_id, peer.addresses)
        return answer

    async def _ask_holder(self, peer: PeerAddress, question: Question) -> Answer:
        if peer.peer_id == self._fabric.peer_id:
            return self._answer(question, peer.peer_id)
        return await self._ask(peer, question)

    async def _holders_of(self, key: bytes) -> list[PeerAddress]:
        """Return who is to hold what is stored under ``key``, this process itself among them if it is that close."""
        async with self._limiter:
            closest = await self._lookup(key)
        closest.append(PeerAddress(self._fabric.peer_id, ()))
        closest.sort(key=lambda peer: distance(key, key_of_peer(peer.peer_id)))
        return closest[: limits.CAPABILITY_HOLDERS_COUNT]

    async def _find_all(self, labels: Iterable[str], timeout_s: float) -> dict[PeerId, FoundRecord]:
        """Return the records under ``labels`` and those below them, by publisher, as found within ``timeout_s``."""
        records: dict[PeerId, FoundRecord] = {}
        until = trio.current_time() + timeout_s
        keys_left = limits.SEARCH_KEYS_MAX_COUNT

        async def find(label: str, bits: str = "") -> None:
            nonlocal keys_left
            keys_left -= 1
            async with self._limiter:
                # A little is left to look at what came.
                left_s = 0.9 * (until - trio.current_time())
                has_more = await self._find(self._secrets.locate(label_below(label, bits)), left_s, records)
            if has_more and len(bits) < limits.CAPABILITY_DEPTH_MAX_COUNT and keys_left > 1:
                for bit in "01":
                    nursery.start_soon(find, label, bits + bit)

        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                for label in labels:
                    nursery.start_soon(find, label)
        return records

    async def _find(self, key: bytes, timeout_s: float, records: dict[PeerId, FoundRecord]) -> bool:
        """Add the verified records under ``key``, of each publisher the newest, and that at its least age.

        Returns whether there may be more under keys below it.
        """
        now = trio.current_time()
        held = [(self._fabric.peer_id, HeldRecord(record=r, age_s=age_s)) for r, age_s in self._store.get(key, now)]
        overflowed = {self._fabric.peer_id} if self._store.has_overflowed(key, now) else set()
        await self._lookup(key, timeout_s=timeout_s, records=held, overflowed=overflowed)
        verdicts: dict[SignedRecord, CapabilityRecord | None] = {}
        for holder, one in held:
            if one.age_s >= one.record.lifetime_s:
                continue
            if one.record not in verdicts:
                verdicts[one.record] = self._verified(key, one.record)
            record = verdicts[one.record]
            if record is None:
                self.forged_count += 1
                self._table.failed(holder)
                continue
            found = FoundRecord(one.record.publisher, one.record.sequence, record, one.age_s)
            known = records.get(found.publisher)
            if known is None or (found.sequence, -found.age_s) > (known.sequence, -known.age_s):
                records[found.publisher] = found
        return bool(overflowed)

    def _verified(self, key: bytes, signed: SignedRecord) -> CapabilityRecord | None:
        try:
            return open_filed(signed, [key], self._secrets)
        except SparkleError as error:
            logger.debug("a record that was found is not used: %s", error)
            return None

    async def _lookup(
        self,
        key: bytes,
        *,
        timeout_s: float = limits.LOOKUP_TIMEOUT_S,
        records: list[tuple[PeerId, HeldRecord]] | None = None,
        overflowed: set[PeerId] | None = None,
    ) -> list[PeerAddress]:
        """Ask ever closer peers; return the closest that answered.

        What they hold under ``key`` goes to ``records``, and who had no room for more to ``overflowed``.
        """
        routes = self._table.closest(key, limits.ROUTING_BUCKET_MAX_COUNT)
        start = [PeerAddress(route.peer_id, route.addresses) for route in routes]
        lookup = Lookup(key, self._fabric.peer_id, start, now=trio.current_time(), timeout_s=timeout_s)
        question = Find(key=key, records=records is not None, addresses=self._own_addresses())

        async def ask(peer: PeerAddress) -> None:
            answer = await self._ask(peer, question)
            if not isinstance(answer, Found):
                raise ProtocolError(f"peer {peer.peer_id} answered a Find with a {type(answer).__name__}")
            lookup.answered(peer.peer_id, answer.peers, remote_address=self._fabric.remote_address(peer.peer_id))
            for one in answer.peers:
                self._heard(one.peer_id, one.addresses, "exchange", one.role)
            if records is not None:
                records.extend((peer.peer_id, held) for held in answer.records)
            if overflowed is not None and answer.overflowed:
                overflowed.add(peer.peer_id)

        return await run_lookup(lookup, ask)

    def _own_addresses(self) -> tuple[Address, ...]:
        return tuple(self._fabric.addresses)[: limits.ADDRESSES_PER_PEER_MAX_COUNT]
