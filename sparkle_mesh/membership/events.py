"""What membership tells of: peers that come and go, and views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from sparkle_mesh.fabric.interface import PeerId
from sparkle_mesh.membership.messages import Introduction
from sparkle_mesh.membership.view import View


@dataclass(frozen=True, slots=True)
class PeerAdmitted:
    """A peer proved the key and introduced itself."""

    peer_id: PeerId
    introduction: Introduction


@dataclass(frozen=True, slots=True)
class PeerGone:
    """An admitted peer left (``graceful``), died, or fell silent.

    It is of the mesh still if it ``stays``: then one of the two has enough other peers.
    """

    peer_id: PeerId
    reason: str
    graceful: bool
    stays: bool = False


@dataclass(frozen=True, slots=True)
class PeerRefused:
    """A peer is not of this mesh; ``wrong_key`` when it does not hold the key (or means another mesh)."""

    peer_id: PeerId
    reason: str
    wrong_key: bool


@dataclass(frozen=True, slots=True)
class ViewChanged:
    """A view was agreed; ``mine`` tells whether this process is a member of it."""

    view: View
    mine: bool


MembershipEvent: TypeAlias = PeerAdmitted | PeerGone | PeerRefused | ViewChanged
