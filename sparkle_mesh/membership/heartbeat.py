"""Sees that peers are there: by pings, and by how long they are silent compared with what is usual for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import Entropy
from sparkle_mesh.membership.channel import PeerChannel
from sparkle_mesh.membership.view import Member


class Heartbeat:
    """Pings the peers of ``channels``; says who is ``suspected`` to be gone, and who of them is ``trusted`` again."""

    def __init__(
        self,
        channels: Mapping[str, PeerChannel],
        entropy: Entropy,
        *,
        suspected: Callable[[Member, str], None],
        trusted: Callable[[Member], None],
    ) -> None:
        self._channels, self._entropy = channels, entropy
        self._suspected, self._trusted = suspected, trusted

    async def run(self) -> None:
        """Do so until cancelled."""
        probe = 0
        before, ping_at = trio.current_time(), 0.0
        while True:
            await trio.sleep(limits.SUSPICION_LOOK_INTERVAL_S * self._entropy.uniform(0.9, 1.1))
            now = trio.current_time()
            held_up = now - before > 4 * limits.SUSPICION_LOOK_INTERVAL_S
            before = now
            for channel in list(self._channels.values()):
                if held_up:
                    # This process did not run (a stop, a suspended laptop, the interpreter held by somebody's C code):
                    # what the others said meanwhile is not read yet.
                    channel.last_heard = now
                self._look_at(channel, now)
            if now >= ping_at:
                ping_at = now + limits.PING_INTERVAL_S
                probe += 1
                for channel in list(self._channels.values()):
                    channel.ping(probe, now=now)

    def _look_at(self, channel: PeerChannel, now: float) -> None:
        silence = now - channel.last_heard
        if silence > limits.SILENCE_TIMEOUT_S:
            channel.drop(f"it was silent for {silence:.1f} s")
        elif silence > patience_s(channel.silences) and not channel.suspected:
            channel.suspected = True
            self._suspected(channel.introduction.member, f"it was silent for {silence:.1f} s")

    def heard(self, channel: PeerChannel) -> None:
        """A peer has said something."""
        channel.hear(now=trio.current_time())
        if channel.suspected:
            channel.suspected = False
            self._trusted(channel.introduction.member)


def patience_s(gaps: Iterable[float]) -> float:
    """Return for how long a peer may be silent that was heard with these ``gaps`` of late, in seconds."""
    longest = max(gaps, default=0.0)
    return min(max(limits.SUSPICION_FLOOR_S, 2 * longest), limits.SUSPICION_CEILING_S)
