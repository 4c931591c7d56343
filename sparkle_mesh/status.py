"""What a running node tells of itself: to its owner's command line, to the dashboard, to programs.

Bounds are wide on purpose: these come from our own node over a socket that only its owner can open, and a
machine with many network interfaces must not make its status unreadable.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.devices.detect import DeviceInfo

DeviceStatus: TypeAlias = DeviceInfo

StatusAddresses = Annotated[tuple[wire.AddressText, ...], msgspec.Meta(max_length=limits.STATUS_ADDRESSES_MAX_COUNT)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class PeerStatus(wire.Message, frozen=True, kw_only=True):
    """One peer as a node sees it.

    Attributes
    ----------
    role
        ``"node"`` or ``"trainer"``.
    machine
        The peer id of its machine's node, whose key has certified it; a node's own. None where there is no certificate.
    addresses
        Where it says that it listens, without the ``/p2p/…`` tail.
    connected_at
        Where it is connected from or to: through a relay if it ends in ``/p2p-circuit``.
    connected_s
        Seconds since it was admitted.
    link
        The kind of the data link to it (``"shared_memory"``, ``"tcp"``, …); None where there is none, as for nodes.
    latency_ms
        Half a round trip, in milliseconds: of the data link if there is one, of the control connection if not; None
        until one was measured.
    bandwidth_bytes_per_s
        What the way to it carried of late when there was enough to send; None until there was.
    rank
        Its rank in the view the node knows of; None if it is not a member.
    admitted
        Whether it has proven that it is of this mesh.
    """

    peer_id: wire.PeerIdText
    role: wire.NameText
    machine: wire.PeerIdText | None = None
    addresses: StatusAddresses
    connected_at: wire.AddressText | None = None
    connected_s: Seconds
    link: wire.NameText | None = None
    latency_ms: float | None = None
    bandwidth_bytes_per_s: float | None = None
    rank: int | None = None
    admitted: bool


class ViewStatus(wire.Message, frozen=True, kw_only=True):
    """A view: its members' peer ids are in rank order."""

    epoch: wire.Count
    lineage_hex: wire.NameText
    size: wire.Count
    members: Annotated[tuple[wire.PeerIdText, ...], msgspec.Meta(max_length=limits.MESH_MEMBERS_MAX_COUNT)]


class RevocationStatus(wire.Message, frozen=True, kw_only=True):
    """The list of revoked peers that holds: its number, and whom it names."""

    sequence: wire.Count
    revoked: Annotated[tuple[wire.PeerIdText, ...], msgspec.Meta(max_length=limits.REVOKED_PEERS_MAX_COUNT)]


class NodeStatus(wire.Message, frozen=True, kw_only=True):
    """A node: who it is, where it listens, its mesh, its machine.

    Attributes
    ----------
    keyed, public
        Whether a key guards the mesh; whether one without a key is open beyond this host and its LAN.
    allowed_count
        How many peers are on the list of those that may come in; 0 if there is no such list.
    founder, revoked_count
        The peer id of the node that may revoke peers, None if none may; how many it has revoked.
    uptime_s
        Seconds since it started.
    peer_count
        Admitted peers now connected.
    view
        The view the node is in or watches; None before one was agreed.
    discovery
        One line on each way in which it looks for peers.
    """

    peer_id: wire.PeerIdText
    addresses: StatusAddresses
    mesh: wire.NameText
    keyed: bool
    public: bool
    allowed_count: wire.Count = 0
    founder: wire.PeerIdText | None = None
    revoked_count: wire.Count = 0
    role: wire.NameText
    version: wire.NameText
    pid: wire.Count
    uptime_s: Seconds
    devices: Annotated[tuple[DeviceStatus, ...], msgspec.Meta(max_length=limits.DEVICES_MAX_COUNT)]
    peer_count: wire.Count
    view: ViewStatus | None = None
    discovery: Annotated[tuple[str, ...], msgspec.Meta(max_length=limits.STATUS_DISCOVERY_MAX_COUNT)] = ()
