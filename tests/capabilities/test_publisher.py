"""Where a record lies while its publisher looks for a better place."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from sparkle_mesh import limits
from sparkle_mesh.capabilities.labels import bits_of, device_label, label_below
from sparkle_mesh.capabilities.messages import Answer, Done, Question, Renew, Store, Withdraw
from sparkle_mesh.capabilities.publisher import Publisher
from sparkle_mesh.clock import SystemClock
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.membership.keys import MeshSecrets
from sparkle_mesh.wire import PeerAddress
from tests.capabilities.conftest import device

HOLDERS = tuple(PeerAddress(Identity.generate().peer_id, ()) for _ in range(limits.CAPABILITY_HOLDERS_COUNT))


class ClimbsToTheTop:
    """Entropy by which a publisher begins at the top whenever it looks for holders."""

    def uniform(self, low: float, high: float) -> float:
        return low + 0.9 * (high - low)

    def token(self, nbytes: int) -> bytes:
        return bytes(nbytes)


async def test_while_it_looks_for_a_place_higher_up_it_is_held_where_it_was(autojump_clock: MockClock) -> None:
    identity, secrets = Identity.generate(), MeshSecrets("a mesh", None)
    label = device_label("cpu", 2)
    keys = [secrets.locate(label_below(label, bits_of(identity.peer_id, depth))) for depth in range(4)]
    held: dict[str, frozenset[bytes]] = {holder.peer_id: frozenset() for holder in HOLDERS}
    asked: list[Question] = []
    searched: list[bool] = []

    async def ask(peer: PeerAddress, question: Question) -> Answer:
        asked.append(question)
        await trio.sleep(0.01)
        missing: frozenset[bytes] = frozenset()
        match question:
            case Renew():
                missing = frozenset(question.keys) - held[peer.peer_id]
                held[peer.peer_id] &= frozenset(question.keys)
            case Store():
                # All but the lowest are full of others'.
                missing = frozenset(question.keys) - {keys[3]}
                held[peer.peer_id] |= frozenset(question.keys) - missing
            case Withdraw():
                held[peer.peer_id] = frozenset()
        searched.append(any(held.values()))
        return Done(missing=tuple(sorted(missing)))

    async def holders_of(key: bytes) -> list[PeerAddress]:
        await trio.sleep(0.01)
        return list(HOLDERS)

    publisher = Publisher(
        identity,
        secrets,
        host_id=b"h" * 16,
        role="node",
        software="test",
        addresses=tuple,
        holders_of=holders_of,
        ask=ask,
        entropy=ClimbsToTheTop(),
        clock=SystemClock(),
    )
    publisher.offer([device("cpu", 8)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publisher.run)
        await trio.sleep(10.0)
        assert all(held.values())
        asked.clear()
        searched.clear()
        await trio.sleep(4 * limits.CAPABILITY_REPUBLISH_MIN_S)
        nursery.cancel_scope.cancel()
    tried = {key for question in asked if isinstance(question, Store) for key in question.keys}
    assert tried == set(keys[:3]), "it was to try all the levels above"
    assert all(searched)
    assert set(held.values()) == {frozenset({keys[3]})}
