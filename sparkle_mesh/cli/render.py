"""What the command prints, as data, as text and as JSON. Pure.

Text that comes from other machines is printed with its control characters escaped: it goes to terminals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sparkle_mesh.status import DeviceStatus, NodeStatus, PeerStatus, RevocationStatus, ViewStatus

if TYPE_CHECKING:
    from sparkle_mesh.capabilities.search import FoundDevice
    from sparkle_mesh.devices.kept_profiles import DeviceProfile
    from sparkle_mesh.membership.view import View

_LABEL_WIDTH = 11


@dataclass(frozen=True, slots=True)
class Line:
    """One thing to print: ``text`` may have several lines, JSON has one object with ``event`` and ``fields``."""

    event: str
    text: str
    fields: dict[str, Any] = field(default_factory=dict)
    with_time: bool = True

    def to_text(self, time_of_day: str) -> str:
        """Return the text form."""
        return f"{time_of_day} {self.text}" if self.with_time else self.text

    def to_json(self, wall_time_s: float) -> str:
        """Return the JSON form, one object on one line."""
        return to_json({"time": round(wall_time_s, 3), "event": self.event, **self.fields})


def to_json(value: Any) -> str:
    """Return ``value`` (messages within it too) as JSON on one line."""
    return msgspec.json.encode(value).decode()


def printable(text: str) -> str:
    """Return ``text`` with everything that is not printable escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


# --- The node's lines ----------------------------------------------------------------------------


def started(status: NodeStatus, data_dir: Path) -> Line:
    """Say what the node is: peer id, addresses, devices, mesh."""
    fields = msgspec.to_builtins(status) | {"data_dir": printable(str(data_dir))}
    rows = [(f"sparkle-node {status.version}", "")]
    rows += _identity_rows(status)
    rows.append(("data", printable(str(data_dir))))
    return Line("started", _labelled(rows), fields, with_time=False)


def port_taken(wanted: Sequence[str]) -> Line:
    """Say that the usual port is in use and another is taken."""
    text = f"{', '.join(wanted)} is in use; listening on a free port instead (choose one with --listen)"
    return Line("port_taken", text, {"wanted": list(wanted), "message": text})


def no_control_socket() -> Line:
    """Say that commands cannot reach this node."""
    text = "this platform has no Unix domain sockets: `sparkle-node status` and the like cannot reach this node"
    return Line("no_control_socket", text, {"message": text})


def peer_joined(peer: PeerStatus) -> Line:
    """Say that a peer was admitted."""
    where = f" of machine {short_id(peer.machine)}" if peer.machine not in (None, peer.peer_id) else ""
    where += f" at {printable(peer.addresses[0])}" if peer.addresses else ""
    return Line(
        "peer_joined",
        f"peer joined  {printable(peer.peer_id)} ({printable(peer.role)}{where})",
        {"peer": peer},
    )


def peer_left(peer_id: str, reason: str) -> Line:
    """Say that a peer is gone, and why."""
    text = f"peer left    {printable(peer_id)}: {printable(reason)}"
    return Line("peer_left", text, {"peer_id": peer_id, "reason": reason})


def peer_refused(peer_id: str, reason: str) -> Line:
    """Say that a peer was not admitted, and why."""
    text = f"peer refused {printable(peer_id)}: {printable(reason)}"
    return Line("peer_refused", text, {"peer_id": peer_id, "reason": reason})


def view_changed(view: View) -> Line:
    """Say that a view was agreed."""
    status = ViewStatus(
        epoch=view.epoch,
        lineage_hex=view.lineage.hex(),
        size=view.size,
        members=tuple(member.peer_id for member in view.members),
    )
    members = ", ".join(f"{rank}={short_id(member)}" for rank, member in enumerate(status.members))
    return Line("view_changed", f"view         epoch {view.epoch}, {view.size} members: {members}", {"view": status})


def stopping(signal_name: str) -> Line:
    """Say that the node is leaving."""
    return Line("stopping", f"stopping ({signal_name}; once more ends at once)", {"signal": signal_name})


def stopped() -> Line:
    """Say that the node has left and nothing is left behind."""
    return Line("stopped", "stopped")


def failed(message: str) -> Line:
    """Say why the node ends."""
    return Line("error", f"sparkle-node: {one_line(message)}", {"message": message}, with_time=False)


def log_line(level: str, logger: str, message: str) -> Line:
    """Return a log record as a line."""
    text = f"{level}: {printable(message)}"
    return Line("log", text, {"level": level, "logger": logger, "message": message})


def dropped_lines(count: int) -> Line:
    """Say that lines are missing here."""
    return Line("dropped", f"({count} lines were dropped here: they were not read in time)", {"lines": count})


# --- The commands' answers -----------------------------------------------------------------------


def status_text(status: NodeStatus) -> str:
    """Return a running node's status for people."""
    rows = _identity_rows(status)
    rows.append(("peers", str(status.peer_count)))
    if status.view is None:
        rows.append(("view", "none yet"))
    else:
        rows.append(
            ("view", f"epoch {status.view.epoch}, lineage {status.view.lineage_hex[:12]}, {status.view.size} members")
        )
        rows += [("", f"{rank}  {printable(member)}") for rank, member in enumerate(status.view.members)]
    rows += _repeated("discovery", map(printable, status.discovery))
    rows.append(("running", f"{duration(status.uptime_s)}, pid {status.pid}, sparkle-mesh {printable(status.version)}"))
    return _labelled(rows)


def peers_text(peers: Sequence[PeerStatus]) -> str:
    """Return a table of peers, one a line, with a heading."""
    if not peers:
        return "no peers"
    table = [("PEER", "ROLE", "MACHINE", "RANK", "LINK", "LATENCY", "BANDWIDTH", "CONNECTED", "ADDRESS")]
    table += [
        (
            printable(peer.peer_id),
            printable(peer.role) if peer.admitted else "not admitted",
            "-" if peer.machine is None else short_id(peer.machine),
            "-" if peer.rank is None else str(peer.rank),
            "-" if peer.link is None else printable(peer.link),
            "-" if peer.latency_ms is None else f"{peer.latency_ms:.1f} ms",
            "-" if peer.bandwidth_bytes_per_s is None else rate(peer.bandwidth_bytes_per_s),
            duration(peer.connected_s),
            printable(peer.connected_at or next(iter(peer.addresses), "-")),
        )
        for peer in peers
    ]
    return _table(table)


def revoked_text(revocations: RevocationStatus) -> str:
    """Return who is revoked, one a line, with a heading."""
    names = "\n".join(printable(peer_id) for peer_id in revocations.revoked)
    return f"list {revocations.sequence} of revoked peers:\n{names}"


def found_devices_text(found: Sequence[FoundDevice]) -> str:
    """Return a table of devices of the mesh, one a line, with a heading."""
    if not found:
        return "no devices"
    table = [("PEER", "DEVICE", "NAME", "MEMORY", "GFLOP/S", "AGE", "ADDRESS")]
    table += [
        (
            printable(one.peer_id),
            f"{printable(one.device.kind)} {one.device.index}",
            printable(one.device.name),
            f"{one.device.memory_bytes / 2**30:.1f} GiB" if one.device.memory_bytes else "-",
            _gflops(one.device.gflops),
            duration(one.age_s),
            printable(one.addresses[0]) if one.addresses else "-",
        )
        for one in found
    ]
    return _table(table)


def profiles_text(profiles: Mapping[str, DeviceProfile]) -> str:
    """Return what devices were measured to do, one a line, with a heading."""
    table = [("DEVICE", "GFLOP/S", "MEMORY", "TO IT", "FROM IT", "LAUNCH")]
    table += [
        (
            printable(name),
            _gflops(profile.gflops),
            _speed(profile.memory_bytes_per_s),
            _speed(profile.to_device_bytes_per_s),
            _speed(profile.from_device_bytes_per_s),
            f"{profile.launch_s * 1e6:.1f} us",
        )
        for name, profile in profiles.items()
    ]
    return _table(table)


def _gflops(by_dtype: Mapping[str, float]) -> str:
    rates = ((printable(dtype), value) for dtype, value in sorted(by_dtype.items()))
    return ", ".join(f"{dtype} {value:.0f}" if value >= 10 else f"{dtype} {value:.1f}" for dtype, value in rates) or "-"


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s else "-"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def device_text(device: DeviceStatus) -> str:
    """Return one device for people."""
    parts = [printable(device.name)]
    if device.cores:
        parts.append(f"{device.cores} cores")
    if device.logical_cores:
        parts.append(f"{device.logical_cores} threads")
    if device.memory_bytes:
        parts.append(f"{device.memory_bytes / 2**30:.1f} GiB")
    if device.features:
        parts.append(printable(" ".join(device.features)))
    if device.driver:
        parts.append(f"driver {printable(device.driver)}")
    return f"{printable(device.kind)} {device.index}: {', '.join(parts)}"


def mesh_text(status: NodeStatus) -> str:
    """Return the mesh and who may come in."""
    if status.keyed:
        who = "only who holds its key"
    elif status.public:
        who = "public: this machine's addresses are shown to anybody who names the mesh"
    else:
        who = "no key: this host and its local networks only"
    if status.allowed_count:
        who += f"; {status.allowed_count} allowed peers and what they certify, no others"
    return f"{printable(status.mesh)} ({who})"


def duration(seconds: float) -> str:
    """Return a length of time in its two largest units."""
    whole = int(seconds)
    for unit_s, unit, lesser_s, lesser in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit_s:
            return f"{whole // unit_s} {unit} {whole % unit_s // lesser_s} {lesser}"
    return f"{whole} s"


def rate(bytes_per_s: float) -> str:
    """Return bytes per second with a unit that fits."""
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if bytes_per_s >= size:
            return f"{bytes_per_s / size:.3g} {unit}"
    return f"{bytes_per_s:.0f} B/s"


def short_id(peer_id: str) -> str:
    """Return the end of a peer id, which tells peers apart (the beginning is the same for all)."""
    return "…" + printable(peer_id[-8:])


def one_line(message: str) -> str:
    """Return ``message`` on one line, fit for a terminal."""
    return printable(" ".join(message.split()))


def _identity_rows(status: NodeStatus) -> list[tuple[str, str]]:
    rows = [("peer id", printable(status.peer_id))]
    rows += _repeated(
        "address", (f"{printable(address)}/p2p/{printable(status.peer_id)}" for address in status.addresses)
    )
    rows += _repeated("device", map(device_text, status.devices))
    rows.append(("mesh", mesh_text(status)))
    if status.founder is not None:
        founder = "this machine" if status.founder == status.peer_id else printable(status.founder)
        rows.append(("founder", f"{founder}, has revoked {status.revoked_count} peers"))
    return rows


def _repeated(label: str, values: Iterable[str]) -> list[tuple[str, str]]:
    return [(label if index == 0 else "", value) for index, value in enumerate(values)]


def _labelled(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{label:<{_LABEL_WIDTH}}{value}".rstrip() for label, value in rows)
