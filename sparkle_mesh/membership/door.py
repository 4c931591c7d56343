"""Who may come in: a machine without I/O that knows the bans, and how many one network may bring."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from sparkle_mesh import limits
from sparkle_mesh.fabric.interface import Address, PeerId
from sparkle_mesh.fabric.networks import is_local_address, network_of
from sparkle_mesh.membership.bans import Bans
from sparkle_mesh.membership.messages import Refused

logger = logging.getLogger(__name__)


class Door:
    """Refuses peers, with a reason.

    Parameters
    ----------
    keyed
        Whether a key guards the mesh: whoever holds it may come from anywhere, with as many others as there are.
    public
        Whether a mesh without a key is open beyond this host and its local networks.
    """

    def __init__(self, *, keyed: bool, public: bool) -> None:
        self._keyed = keyed
        self._open_to_all = public or keyed
        self._bans = Bans()

    def refusal(
        self, peer_id: PeerId, address: Address | None, present: Iterable[Address | None], now: float
    ) -> Refused | None:
        """Return why ``peer_id`` may not come in; None if it may.

        Parameters
        ----------
        address
            Where it is connected from or to.
        present
            The same of those who are in.
        """
        banned = self.ban(peer_id, now)
        if banned is not None:
            return banned
        addresses = list(present)
        if len(addresses) >= limits.MESH_PEERS_MAX_COUNT:
            return Refused(code="full", reason=f"{limits.MESH_PEERS_MAX_COUNT} peers are connected already")
        if not self._open_to_all and not is_local_address(address):
            return Refused(code="not_local", reason="a mesh without a key is open to this host and its LAN only")
        network = None if self._keyed else network_of(address)
        if network is not None:
            count = sum(network_of(other) == network for other in addresses)
            if count >= limits.MESH_PEERS_PER_NETWORK_MAX_COUNT:
                return Refused(code="full", reason=f"{count} peers of the network {network} are connected already")
        return None

    def ban(self, peer_id: PeerId, now: float) -> Refused | None:
        """Return for how long ``peer_id`` is banned, as a refusal; None if it is not."""
        banned_s = self._bans.banned_for(peer_id, now)
        if not banned_s:
            return None
        return Refused(code="full", reason=f"it broke the protocol too often: not for another {banned_s:.0f} s")

    def offended(self, peer_id: PeerId, now: float) -> bool:
        """``peer_id`` has broken the protocol; return whether it is banned now."""
        banned_s = self._bans.offended(peer_id, now)
        if banned_s:
            logger.warning("peer %s broke the protocol too often: it is banned for %.0f s", peer_id, banned_s)
        return banned_s > 0
