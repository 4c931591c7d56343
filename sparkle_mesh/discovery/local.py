"""The registry of this host's processes: one small file each in ``<data_dir>/run/``, readable by their owner.

It finds what no network would: processes on a host without multicast, or that listen on loopback alone. A file
names its process by id and start time, so that one left by a killed process is recognised, also after its id
was given to another, and removed. Where a process cannot be looked at from here (another host on a shared
disk, another container), its file is left alone until it is old.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec
import psutil

from sparkle_mesh import limits, wire
from sparkle_mesh.clock import SYSTEM_CLOCK, SYSTEM_ENTROPY, Clock, Entropy
from sparkle_mesh.discovery.addresses import is_loopback
from sparkle_mesh.environment import host_id
from sparkle_mesh.errors import ProtocolError, VersionError
from sparkle_mesh.fabric.interface import Address, PeerId
from sparkle_mesh.files import make_private_folder, read_bounded, write_private

logger = logging.getLogger(__name__)

VERSION = 1
SUFFIX = ".peer"

Role: TypeAlias = Literal["node", "trainer"]


class RegistryEntry(wire.Message, frozen=True):
    """One process.

    Attributes
    ----------
    scope
        Who can look at the process: 16 bytes that stand for the host and the space of its process ids.
    started_at
        When the process started, in seconds since the Unix epoch.
    addresses
        Where it listens, loopback first.
    role
        ``"node"`` or ``"trainer"``.
    """

    version: wire.Count
    scope: wire.Bytes16
    peer_id: wire.PeerIdText
    pid: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    started_at: float
    addresses: wire.AddressList
    mesh_tags: Annotated[tuple[wire.Bytes32, ...], msgspec.Meta(max_length=limits.REGISTRY_MESHES_MAX_COUNT)]
    role: Role


def process_scope() -> bytes:
    """Return 16 bytes shared by all processes that see each other's process ids."""
    try:
        space = Path("/proc/self/ns/pid").readlink()
    except OSError:
        space = Path()
    return sha256(b"sparkle process scope 1\0" + host_id() + str(space).encode()).digest()[:16]


def is_running(pid: int, started_at: float) -> bool:
    """Whether the process ``pid`` that started then still runs. A zombie does not."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started_at) <= limits.PROCESS_START_TOLERANCE_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        # There is such a process and it tells nothing: not to be declared dead.
        return True


@dataclass(slots=True)
class _File:
    """What was last seen of one file; ``entry`` is None if it is damaged."""

    signature: tuple[int, int, int]
    entry: RegistryEntry | None


def file_name(peer_id: PeerId, pid: int) -> str:
    """Return the name of the file in which process ``pid`` announces ``peer_id``."""
    return f"{sha256(peer_id.encode()).hexdigest()[:32]}-{pid}{SUFFIX}"


class LocalRegistry:
    """This process's entry and those of others."""

    def __init__(
        self,
        data_dir: Path,
        *,
        clock: Clock = SYSTEM_CLOCK,
        entropy: Entropy = SYSTEM_ENTROPY,
        scope: bytes | None = None,
    ) -> None:
        self.folder = data_dir / "run"
        self._clock = clock
        self._entropy = entropy
        self._scope = process_scope() if scope is None else scope
        self._files: dict[str, _File] = {}
        self._own: dict[PeerId, RegistryEntry] = {}

    # --- This process ---------------------------------------------------------------------------

    def announce(
        self, peer_id: PeerId, *, addresses: tuple[Address, ...], mesh_tags: tuple[bytes, ...], role: Role
    ) -> None:
        """Write (again) that this process is ``peer_id``.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        process = psutil.Process()
        ordered = sorted(addresses, key=lambda address: not is_loopback(address))
        entry = RegistryEntry(
            version=VERSION,
            scope=self._scope,
            peer_id=peer_id,
            pid=process.pid,
            started_at=process.create_time(),
            addresses=tuple(ordered[: limits.ADDRESSES_PER_PEER_MAX_COUNT]),
            mesh_tags=mesh_tags,
            role=role,
        )
        make_private_folder(self.folder)
        write_private(self.path_of(peer_id), wire.encode(entry), self._entropy)
        self._own[peer_id] = entry

    def withdraw(self, peer_id: PeerId) -> None:
        """Remove this process's entry. Raises OSError if that is not possible."""
        if self._own.pop(peer_id, None) is not None:
            self.path_of(peer_id).unlink(missing_ok=True)

    def needs_renewal(self, peer_id: PeerId) -> bool:
        """Whether this process's file was removed by somebody, or is so old that other hosts might remove it."""
        try:
            age_s = self._clock.wall_time() - self.path_of(peer_id).stat().st_mtime
        except OSError:
            return True
        return age_s > limits.REGISTRY_RENEW_S

    def path_of(self, peer_id: PeerId) -> Path:
        """Return where this process announces ``peer_id``."""
        return self.folder / file_name(peer_id, os.getpid())

    # --- The others -----------------------------------------------------------------------------

    def changed_at(self) -> int | None:
        """Return the folder's time of change in nanoseconds; None if there is no folder."""
        try:
            return self.folder.stat().st_mtime_ns
        except OSError:
            return None

    def read_all(self) -> tuple[RegistryEntry, ...]:
        """Return the entries of running processes of this host, except those announced here.

        Files of dead processes are removed. Files already known are not read again. Logs instead of raising.
        """
        names = self._scan()
        for gone in self._files.keys() - names.keys():
            del self._files[gone]
        entries = []
        for name, signature in names.items():
            known = self._files.get(name)
            if known is None or known.signature != signature:
                entry = self._read(name)
                known = self._files[name] = _File(signature, entry)
            if known.entry is None:
                self._remove_damaged(name, signature)
            elif self._is_live(name, known.entry, signature) and known.entry.peer_id not in self._own:
                entries.append(known.entry)
        return tuple(entries)

    def _scan(self) -> dict[str, tuple[int, int, int]]:
        """Return inode, time of change and size of each entry's file, by name."""
        names: dict[str, tuple[int, int, int]] = {}
        try:
            with os.scandir(self.folder) as found:
                for file in found:
                    # Half-written ones that a killed process left end in something else.
                    if SUFFIX not in file.name or len(names) >= limits.REGISTRY_ENTRIES_MAX_COUNT:
                        continue
                    try:
                        status = file.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if file.name.endswith(SUFFIX):
                        names[file.name] = (status.st_ino, status.st_mtime_ns, status.st_size)
                    else:
                        self._remove_if_old(file.name, (0, status.st_mtime_ns, 0))
        except FileNotFoundError:
            return {}
        except OSError as error:
            logger.warning("processes of this host cannot be listed in %s: %s", self.folder, error)
            return {}
        return names

    def _read(self, name: str) -> RegistryEntry | None:
        path = self.folder / name
        try:
            data = read_bounded(path, limits.REGISTRY_ENTRY_MAX_BYTES)
            entry = wire.decode(data, RegistryEntry, max_bytes=limits.REGISTRY_ENTRY_MAX_BYTES)
            if entry.version != VERSION or name != file_name(entry.peer_id, entry.pid):
                raise VersionError(f"it is of version {entry.version}, or not under its peer's name")
        except FileNotFoundError:
            return None
        except (OSError, ProtocolError) as error:
            logger.warning("%s is skipped: %s", path, error)
            return None
        return entry

    def _is_live(self, name: str, entry: RegistryEntry, signature: tuple[int, int, int]) -> bool:
        if entry.scope != self._scope:
            self._remove_if_old(name, signature)
            return False
        if is_running(entry.pid, entry.started_at):
            return True
        logger.info("process %d of peer %s is gone; removing its entry", entry.pid, entry.peer_id)
        self._remove(name)
        return False

    def _remove_damaged(self, name: str, signature: tuple[int, int, int]) -> None:
        """Remove a file that tells nothing, once the process in its name is gone; a living one writes it anew."""
        pid_text = name.removesuffix(SUFFIX).rpartition("-")[2]
        if not (pid_text.isascii() and pid_text.isdigit()):
            self._remove_if_old(name, signature)
        elif not psutil.pid_exists(int(pid_text[:9])):
            self._remove(name)

    def _remove_if_old(self, name: str, signature: tuple[int, int, int]) -> None:
        """Remove what nobody can tell the process of, once no living process would have left it so long."""
        if self._clock.wall_time() - signature[1] / 1e9 > limits.REGISTRY_FOREIGN_MAX_AGE_S:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._files.pop(name, None)
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s cannot be removed: %s", self.folder / name, error)
