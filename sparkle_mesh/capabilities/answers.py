"""How a question of the mesh's DHT is answered: a machine without I/O."""

from __future__ import annotations

from sparkle_mesh import limits
from sparkle_mesh.capabilities.messages import (
    Answer,
    Done,
    Dropped,
    Find,
    Found,
    HeldRecord,
    Question,
    Refused,
    Renew,
    Store,
    Withdraw,
)
from sparkle_mesh.capabilities.store import RecordStore, StaleRecordError
from sparkle_mesh.discovery.routing_table import RoutingTable
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.fabric.interface import Address, PeerId
from sparkle_mesh.fabric.networks import source_of
from sparkle_mesh.wire import PeerAddress


class Answers:
    """Answers questions from the table of peers and the records held."""

    def __init__(self, table: RoutingTable, store: RecordStore) -> None:
        self._table, self._store = table, store
        #: Questions that were refused, since the start.
        self.refused_count = 0

    def answer(self, question: Question, sender: PeerId, remote_address: Address | None, now: float) -> Answer:
        """Return the answer to what ``sender``, authenticated and connected from there, asks."""
        match question:
            case Find():
                self._table.answered(sender, question.addresses, now, remote_address=remote_address)
                return self._found(question, sender, now)
            case Renew():
                return Done(missing=tuple(sorted(self._store.renew(sender, question.sequence, question.keys, now))))
            case Withdraw():
                self._store.withdraw(sender)
                return Done()
            case Dropped():
                # It is the publisher's to do something about it.
                return Done()
            case Store():
                return self._stored(question, sender, remote_address, now)

    def _stored(self, question: Store, sender: PeerId, remote_address: Address | None, now: float) -> Answer:
        origin = source_of(remote_address) or sender
        held_sequence = None
        try:
            full = self._store.store(question.record, question.keys, now, sender=sender, origin=origin)
        except StaleRecordError as error:
            reason, held_sequence = str(error), error.held_sequence
        except SparkleError as error:
            reason = str(error)
        else:
            return Done(missing=tuple(sorted(full)))
        self.refused_count += 1
        return Refused(reason=reason[: limits.REASON_MAX_CHARS], held_sequence=held_sequence)

    def _found(self, question: Find, sender: PeerId, now: float) -> Found:
        routes = self._table.closest(question.key, limits.CAPABILITY_HOLDERS_COUNT, but=sender)
        peers = tuple(PeerAddress(route.peer_id, route.addresses, route.role) for route in routes)
        records: list[HeldRecord] = []
        room = limits.KAD_ANSWER_RECORDS_MAX_BYTES
        for record, age_s in self._store.get(question.key, now) if question.records else ():
            room -= record.nbytes
            if room < 0:
                break
            records.append(HeldRecord(record=record, age_s=age_s))
        return Found(peers=peers, records=tuple(records), overflowed=self._store.has_overflowed(question.key, now))
