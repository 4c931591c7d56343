"""Whom to name to a peer that has come in, or that is let go."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import Entropy
from sparkle_mesh.membership.channel import PeerChannel
from sparkle_mesh.membership.messages import PeerExchange
from sparkle_mesh.wire import PeerAddress


def name_others(
    channel: PeerChannel, channels: Iterable[PeerChannel], entropy: Entropy, *, unless_told_s: float = 0.0
) -> None:
    """Tell the peer of others: to a trainer all trainers, which it needs, and some of the rest, drawn by lot.

    Not if it was told less than ``unless_told_s`` ago.
    """
    now = trio.current_time()
    if now - channel.told_others_at < unless_told_s:
        return
    channel.told_others_at = now
    others = [other for other in channels if other is not channel and other.introduction.addresses]
    is_to_trainer = channel.introduction.role == "trainer"
    needed = [other for other in others if is_to_trainer and other.introduction.role == "trainer"]
    rest = [other for other in others if other not in needed]
    if len(rest) > limits.PEER_EXCHANGE_SAMPLE_COUNT:
        rest.sort(key=lambda other: entropy.uniform(0.0, 1.0))
    named = [
        PeerAddress(other.peer_id, other.introduction.addresses, other.introduction.role)
        for other in (*needed, *rest[: limits.PEER_EXCHANGE_SAMPLE_COUNT])
    ]
    for start in range(0, len(named), limits.PEER_EXCHANGE_MAX_COUNT):
        channel.send(PeerExchange(peers=tuple(named[start : start + limits.PEER_EXCHANGE_MAX_COUNT])))
