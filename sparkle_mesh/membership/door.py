"""Who may come in: a machine without I/O that knows the bans, the certificates, and how many one network may bring."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Final

from sparkle_mesh import limits
from sparkle_mesh.errors import ProtocolError, UsageError
from sparkle_mesh.fabric.identity import public_key_of_peer_id
from sparkle_mesh.fabric.interface import Address, PeerId
from sparkle_mesh.fabric.networks import is_local_address, network_of
from sparkle_mesh.membership.bans import Bans
from sparkle_mesh.membership.certificates import CertificateJudge, Judgement
from sparkle_mesh.membership.messages import Introduction, Refused
from sparkle_mesh.membership.revocations import RevocationList

# Earlier versions do not know a code of its own, and would not show the reason.
_NOT_LET_IN: Final = "not_local"

logger = logging.getLogger(__name__)


def checked_allow(what: str, peer_ids: Iterable[PeerId]) -> tuple[PeerId, ...]:
    """Return a list of peers that are to be let in, each once.

    Raises
    ------
    UsageError
        If one is not a peer id; the message says so of ``what``.
    """
    allow = tuple(dict.fromkeys(peer_ids))
    for peer_id in allow:
        try:
            public_key_of_peer_id(peer_id)
        except ProtocolError as error:
            raise UsageError(f"{what}: {error}; `sparkle-node id` prints a machine's") from error
    return allow


class Door:
    """Refuses peers, with a reason.

    Parameters
    ----------
    keyed
        Whether a key guards the mesh: whoever holds it may come from anywhere, with as many others as there are.
    public
        Whether a mesh without a key is open beyond this host and its local networks.
    tag
        The mesh's, which certificates name.
    allow
        If there are any, only these peers are let in, and those whose certificates these have signed.
    revocations
        Whom the mesh's founder has thrown out; it changes while this runs.
    """

    def __init__(
        self,
        *,
        keyed: bool,
        public: bool,
        tag: bytes,
        allow: Collection[PeerId] = (),
        revocations: RevocationList | None = None,
    ) -> None:
        self._keyed = keyed
        self._open_to_all = public or keyed
        self._bans = Bans()
        self._certificates = CertificateJudge(tag)
        self._allow = frozenset(allow)
        self._revocations = RevocationList(tag) if revocations is None else revocations

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

    def introduced(
        self, peer_id: PeerId, introduction: Introduction, now: float, *, own: PeerId | None = None
    ) -> PeerId | Refused | None:
        """``peer_id`` has proven the key and told of itself: return its machine, None if unknown, or why it is refused.

        The machine is the peer id of its node. A certificate that is forged, another process's or another mesh's is an
        offence: no process that keeps to the protocol sends one. One that has lapsed, or is of a later version, is not
        believed, and that is all.

        Parameters
        ----------
        own
            The machine of this process: it and its processes need not be on the list of those that are let in.
        """
        if introduction.member.peer_id != peer_id:
            self.offended(peer_id, now)
            name = introduction.member.peer_id
            return Refused(code="duplicate", reason=f"peer {peer_id} introduced itself as {name}")
        judgement = self._judge(peer_id, introduction, now)
        if isinstance(judgement, Refused):
            return judgement
        machine = judgement.machine
        revoked = self.revoked(peer_id, machine)
        if revoked is not None:
            return revoked
        if self._allow and not {peer_id, machine} & {*self._allow, own} - {None}:
            shown = judgement.doubt or (f"it is of machine {machine}" if machine else "it has shown no certificate")
            return Refused(
                code=_NOT_LET_IN,
                reason=f"{peer_id} is not on the list of peers that are allowed here, nor certified by one of them "
                f"({shown}); if it should be, add {machine or 'its machine'} with --allow, or allow= of join",
            )
        if judgement.doubt:
            logger.info("of which machine peer %s is stays unknown: %s", peer_id, judgement.doubt)
        return machine

    def _judge(self, peer_id: PeerId, introduction: Introduction, now: float) -> Judgement | Refused:
        if introduction.certificate is None:
            return Judgement(peer_id if introduction.role == "node" else None)
        try:
            return self._certificates.judge(introduction.certificate, peer_id, now)
        except ProtocolError as error:
            self.offended(peer_id, now)
            return Refused(code="duplicate", reason=str(error)[: limits.REASON_MAX_CHARS])

    def revoked(self, peer_id: PeerId, machine: PeerId | None = None) -> Refused | None:
        """Return that ``peer_id``, or the machine that it is of, is revoked, as a refusal; None if neither is."""
        name = self._revocations.is_revoked(peer_id, machine)
        if name is None:
            return None
        what = name if name == peer_id else f"{name}, the machine that {peer_id} is of,"
        return Refused(code=_NOT_LET_IN, reason=f"{what} was revoked by the mesh's founder")

    def ban(self, peer_id: PeerId, now: float) -> Refused | None:
        """Return for how long ``peer_id`` is banned, or that it is revoked, as a refusal; None if it is neither."""
        revoked = self.revoked(peer_id)
        if revoked is not None:
            return revoked
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
