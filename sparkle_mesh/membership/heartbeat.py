"""Sees that peers are there: by pings, and by how long they are silent compared with what is usual for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import Entropy
from sparkle_mesh.membership.channel import PeerChannel
from sparkle_mesh.membership.view import Member


class Heartbeat:
    """Pings the peers of ``channels``; says who is ``suspected`` to be gone, and who of them is ``trusted`` again.

    Parameters
    ----------
    is_node
        Whether this process is a node: then it waits for nobody.
    max_silence_s
        For how long a peer may be silent at most, whatever is usual for it.
    """

    def __init__(
        self,
        channels: Mapping[str, PeerChannel],
        entropy: Entropy,
        *,
        is_node: bool = False,
        max_silence_s: float = limits.SUSPICION_CEILING_S,
        suspected: Callable[[Member, str], None],
        trusted: Callable[[Member], None],
    ) -> None:
        self._channels, self._entropy = channels, entropy
        self._is_node = is_node
        self._max_silence_s = max_silence_s
        self._suspected, self._trusted = suspected, trusted
        #: Who is to be asked, one after the other.
        self._turns: deque[str] = deque()

    async def run(self) -> None:
        """Do so until cancelled."""
        probe = 0
        look_s = limits.NODE_LOOK_INTERVAL_S
        if not self._is_node:
            look_s = min(limits.SUSPICION_LOOK_INTERVAL_S, self._max_silence_s / 8)
        ping_s = min(limits.PING_INTERVAL_S, self._max_silence_s / 4)
        before, ping_at = trio.current_time(), 0.0
        while True:
            await trio.sleep(look_s * self._entropy.uniform(0.9, 1.1))
            now = trio.current_time()
            held_up = now - before > 4 * look_s
            before = now
            rounds = -(-len(self._channels) // limits.PINGS_AT_ONCE_MAX_COUNT)
            for channel in list(self._channels.values()):
                if held_up:
                    # This process did not run (a stop, a suspended laptop, the interpreter held by somebody's C code):
                    # what the others said meanwhile is not read yet.
                    channel.last_heard = now
                self._look_at(channel, now, 3 * rounds * ping_s)
            if now >= ping_at:
                ping_at = now + ping_s
                probe += 1
                for peer_id in self._next_turns(now):
                    self._channels[peer_id].ping(probe, now=now)

    def _is_of_node(self, channel: PeerChannel) -> bool:
        """Whether at one of its ends is a node: that may be silent for longer."""
        return self._is_node or channel.introduction.role == "node"

    def _next_turns(self, now: float) -> list[str]:
        """Whom to ask now: all that are due, or those of many that were not asked for longest."""
        self._turns = deque(peer_id for peer_id in self._turns if peer_id in self._channels)
        known = set(self._turns)
        self._turns.extend(peer_id for peer_id in self._channels if peer_id not in known)
        due = [peer_id for peer_id in self._turns if self._is_due(self._channels[peer_id], now)]
        asked = due[: limits.PINGS_AT_ONCE_MAX_COUNT]
        for peer_id in asked:
            self._turns.remove(peer_id)
        self._turns.extend(asked)
        return asked

    def _is_due(self, channel: PeerChannel, now: float) -> bool:
        if not self._is_of_node(channel):
            return True
        # What one asks shows the other that it is there, too: the other need not ask.
        at = max(channel.pinged_at, channel.last_heard)
        return now - at >= limits.NODE_PING_INTERVAL_S

    def _look_at(self, channel: PeerChannel, now: float, at_least_s: float) -> None:
        silence = now - channel.last_heard
        if self._is_of_node(channel):
            if silence > limits.NODE_SILENCE_TIMEOUT_S:
                channel.drop(f"it was silent for {silence:.1f} s")
            return
        if silence > limits.SILENCE_TIMEOUT_S:
            channel.drop(f"it was silent for {silence:.1f} s")
        elif silence > max(patience_s(channel.silences, self._max_silence_s), at_least_s) and not channel.suspected:
            channel.suspected = True
            self._suspected(channel.introduction.member, f"it was silent for {silence:.1f} s")

    def heard(self, channel: PeerChannel) -> None:
        """A peer has said something."""
        channel.hear(now=trio.current_time())
        if channel.suspected:
            channel.suspected = False
            self._trusted(channel.introduction.member)


def patience_s(gaps: Iterable[float], ceiling_s: float = limits.SUSPICION_CEILING_S) -> float:
    """Return for how long a peer may be silent that was heard with these ``gaps`` of late, in seconds."""
    longest = max(gaps, default=0.0)
    return min(max(limits.SUSPICION_FLOOR_S, 2 * longest), ceiling_s)
