"""Who has broken the protocol of late, and for how long nothing is taken from them: a machine without I/O."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from sparkle_mesh import limits
from sparkle_mesh.fabric.interface import PeerId


@dataclass(slots=True)
class _Conduct:
    """What one peer has done; ``at`` are the times of its offences since it was last banned."""

    at: list[float] = field(default_factory=list)
    bans: int = 0
    banned_until: float = float("-inf")


class Bans:
    """Counts offences, and bans peers for a time that doubles.

    One offence may be an accident: an upgrade that went wrong, a program that was killed while it wrote. After
    ``limits.OFFENCES_MAX_COUNT`` within ``limits.OFFENCES_REMEMBERED_S`` a peer is banned for ``limits.BAN_MIN_S``, and
    each time after for twice as long, up to ``limits.BAN_MAX_S``.
    """

    def __init__(self, *, max_count: int = limits.BANS_MAX_COUNT) -> None:
        self._max_count = max_count
        # Those that offended last come last.
        self._conduct: OrderedDict[PeerId, _Conduct] = OrderedDict()

    def __len__(self) -> int:
        return len(self._conduct)

    def offended(self, peer_id: PeerId, now: float) -> float:
        """``peer_id`` has broken the protocol; return for how many seconds it is banned from now on, 0 if it is not."""
        conduct = self._conduct.setdefault(peer_id, _Conduct())
        self._conduct.move_to_end(peer_id)
        if len(self._conduct) > self._max_count:
            self._conduct.popitem(last=False)
        conduct.at = [at for at in conduct.at if now - at < limits.OFFENCES_REMEMBERED_S] + [now]
        if len(conduct.at) >= limits.OFFENCES_MAX_COUNT:
            conduct.banned_until = now + min(limits.BAN_MIN_S * 2.0**conduct.bans, limits.BAN_MAX_S)
            conduct.bans = min(conduct.bans + 1, 30)
            conduct.at = []
        return self.banned_for(peer_id, now)

    def banned_for(self, peer_id: PeerId, now: float) -> float:
        """Return for how many seconds ``peer_id`` is banned still; 0 if it is not."""
        conduct = self._conduct.get(peer_id)
        return 0.0 if conduct is None else max(conduct.banned_until - now, 0.0)
