"""What the options of ``sparkle-node`` come to, checked. Pure but for reading the key file."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparkle_mesh import limits
from sparkle_mesh.environment import bootstrap_peers
from sparkle_mesh.errors import UsageError

if TYPE_CHECKING:
    from sparkle_mesh.discovery.reach import ReachConfig
    from sparkle_mesh.membership.keys import MeshKey

DEFAULT_MESH = "sparkle"
DEFAULT_LISTEN = f"/ip4/0.0.0.0/tcp/{limits.DEFAULT_PORT}"
_HOST_PROTOCOLS = ("ip4", "ip6", "dns", "dns4", "dns6")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReachOptions:
    """The options about what is beyond the local network, as given.

    Attributes
    ----------
    internet
        Whether public peers may be used.
    bootstrap
        Which, if the owner says.
    relay_bandwidth
        What to carry a second for others, as text; None for the default.
    port_mapping
        Whether to ask the router to pass connections on.
    reachability
        ``"public"`` or ``"private"`` if the owner knows, else ``"auto"``.
    """

    internet: bool = True
    bootstrap: Sequence[str] = ()
    relay_bandwidth: str | None = None
    port_mapping: bool = True
    reachability: str = "auto"

    def resolve(self, *, mesh: str, keyed: bool, public: bool) -> ReachConfig:
        """Check them, and return what the node of a mesh is to do.

        Raises
        ------
        UsageError
            If one cannot be, or two contradict each other.
        """
        from sparkle_mesh.capabilities.search import parse_memory
        from sparkle_mesh.discovery.bootstrap import choose_bootstrap
        from sparkle_mesh.discovery.reach import ReachConfig
        from sparkle_mesh.fabric.relay_book import RelayLimits

        if self.bootstrap and not self.internet:
            raise UsageError("--bootstrap and --no-public contradict each other")
        given = self.bootstrap or (None if self.internet else ())
        bootstrap = choose_bootstrap(given, mesh=mesh, keyed=keyed, public=public, preset=bootstrap_peers())
        carries = limits.RELAY_BYTES_PER_S if self.relay_bandwidth is None else parse_memory(self.relay_bandwidth)
        return ReachConfig(
            bootstrap=bootstrap,
            relay=RelayLimits(bytes_per_s=float(carries)) if carries else None,
            # Only where others beyond the local network are to be met.
            port_mapping=self.port_mapping and bool(bootstrap),
            reachability=None if self.reachability == "auto" else self.reachability,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeSettings:
    """How the node is to run.

    Attributes
    ----------
    listen_chosen
        Whether the owner asked for ``listen``; if not, another port will do.
    join
        Addresses with ``/p2p/…`` tails, and invites to this mesh.
    reach
        What the node does beyond the local network.
    founder
        The peer id of the node that may revoke peers; None if an invite is to say, or the data directory.
    allow
        Peers that are let in, with those that they certify; everybody if there are none.
    """

    mesh: str
    key: MeshKey | None = None
    public: bool = False
    listen: tuple[str, ...] = (DEFAULT_LISTEN,)
    listen_chosen: bool = False
    join: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    founder: str | None = None
    data_dir: Path
    lan: bool = True
    reach: ReachConfig | None = None

    def on_any_port(self) -> NodeSettings:
        """Return the same settings listening on a port that the system chooses."""
        return replace(self, listen=tuple(address.rpartition("/")[0] + "/0" for address in self.listen))


def resolve_settings(
    *,
    mesh: str | None,
    key_file: Path | None,
    join: Sequence[str],
    listen: Sequence[str],
    public: bool,
    lan: bool,
    data_dir: Path,
    reach: ReachOptions | None = None,
    allow: Sequence[str] = (),
    founder: str | None = None,
) -> NodeSettings:
    """Check the options and put them together; an invite fills in the name and key it holds.

    Raises
    ------
    UsageError
        If one cannot be, or two contradict each other; the message names the option.
    """
    # These pull in the cryptography package, which commands that only ask the node do without.
    from sparkle_mesh.membership.door import checked_allow
    from sparkle_mesh.membership.invite import Invite, is_invite
    from sparkle_mesh.membership.keys import MeshKey, MeshSecrets

    key = MeshKey.load(key_file) if key_file is not None else None
    key_is_known = key is not None
    for item in join:
        if not is_invite(item):
            check_join_address(item)
            continue
        invite = Invite.decode(item)
        if mesh is not None and mesh != invite.name:
            raise UsageError(
                f"--join: the invite is to the mesh {invite.name!r}, not to {mesh!r}; join one mesh at a time"
            )
        if founder is not None and invite.founder not in (None, founder):
            raise UsageError(
                f"--join: the invite names {invite.founder} as the mesh's founder, and --founder {founder}"
            )
        if key_is_known and key != invite.key:
            raise UsageError(
                f"--join: the invite to {invite.name!r} holds another key (or none) than --key-file or another invite"
            )
        mesh, key, key_is_known = invite.name, invite.key, True
    for address in listen:
        check_listen_address(address)
    mesh = DEFAULT_MESH if mesh is None else mesh
    settings = NodeSettings(
        mesh=mesh,
        key=key,
        public=public,
        listen=tuple(listen) or (DEFAULT_LISTEN,),
        listen_chosen=bool(listen),
        join=tuple(join),
        allow=checked_allow("--allow", allow),
        founder=checked_allow("--founder", [founder])[0] if founder is not None else None,
        data_dir=data_dir,
        lan=lan,
        reach=(reach or ReachOptions()).resolve(mesh=mesh, keyed=key is not None, public=public),
    )
    if founder is not None and settings.key is None:
        raise UsageError(
            "--founder: nobody can be kept out of a mesh without a key; make one with `sparkle-node new-key`"
        )
    MeshSecrets(settings.mesh, settings.key)  # says what a name must be
    return settings


def check_listen_address(address: str) -> None:
    """Make sure that ``address`` is ``/ip4|ip6/<address>/tcp/<port>``.

    Raises
    ------
    UsageError
        If not; the message shows what it should look like.
    """
    match address.split("/"):
        case ["", "ip4" | "ip6" as protocol, host, "tcp", port] if _is_ip(protocol, host) and _is_port(port, lowest=0):
            return
    raise UsageError(f"--listen {address!r} is not an address to listen on; give one like {DEFAULT_LISTEN}")


def check_join_address(address: str) -> None:
    """Make sure that ``address`` is ``/ip4|ip6|dns|dns4|dns6/<host>/tcp/<port>/p2p/<peer id>``.

    For a peer behind a relay that is followed by ``/p2p-circuit/p2p/<peer id>``.

    Raises
    ------
    UsageError
        If not; the message shows what it should look like.
    """
    through, is_relayed, behind = address.partition("/p2p-circuit/p2p/")
    match through.split("/"):
        case ["", protocol, host, "tcp", port, "p2p", peer_id] if (
            protocol in _HOST_PROTOCOLS
            and host
            and peer_id.isalnum()
            and _is_port(port, lowest=1)
            and (behind.isalnum() or not is_relayed)
        ):
            if not protocol.startswith("ip") or _is_ip(protocol, host):
                return
    # Shown only if it cannot be a mangled invite, which is a secret.
    harmless = address.startswith("/") or len(address) < 40
    shown = repr(address[:80]) if harmless else f"({len(address)} characters)"
    raise UsageError(
        f"--join {shown} is neither an invite nor an address with a peer id; give one like "
        f"/ip4/192.168.1.4/tcp/{limits.DEFAULT_PORT}/p2p/12D3KooW…, as the other node prints it"
    )


def _is_ip(protocol: str, host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == int(protocol[2:])
    except ValueError:
        return False


def _is_port(text: str, *, lowest: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and lowest <= int(text) <= 65535
