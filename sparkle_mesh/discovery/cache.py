"""Peers of a mesh kept on disk from one run to the next, so that a restart finds them when nobody tells.

One file per mesh in ``<data_dir>/peers/``, named by a hash of the mesh's tag. Several processes may write it:
each adds what it knows to what is there and replaces the file whole; who writes last wins, which costs at worst
a hint.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.clock import Clock, Entropy
from sparkle_mesh.errors import ProtocolError, VersionError
from sparkle_mesh.fabric.interface import PeerId
from sparkle_mesh.files import make_private_folder, read_bounded, set_aside, write_private

logger = logging.getLogger(__name__)

VERSION = 1
SUFFIX = ".peers"


class CachedPeer(wire.Message, frozen=True):
    """A peer that was connected; ``seen_at`` is when last, in seconds since the Unix epoch."""

    peer_id: wire.PeerIdText
    addresses: wire.AddressList
    seen_at: float


class CacheFile(wire.Message, frozen=True):
    """The whole file."""

    version: wire.Count
    mesh_tag: wire.Bytes32
    peers: Annotated[tuple[CachedPeer, ...], msgspec.Meta(max_length=limits.PEER_CACHE_PEERS_MAX_COUNT)]


class PeerCache:
    """The cached peers of one mesh."""

    def __init__(self, data_dir: Path, mesh_tag: bytes, *, clock: Clock, entropy: Entropy) -> None:
        self._folder = data_dir / "peers"
        self._mesh_tag = mesh_tag
        self._clock = clock
        self._entropy = entropy
        self.path = self._folder / f"{sha256(mesh_tag).hexdigest()[:32]}{SUFFIX}"

    def load(self) -> tuple[CachedPeer, ...]:
        """Return the cached peers, last seen first. A damaged file is set aside; never raises for what it holds."""
        try:
            data = read_bounded(self.path, limits.PEER_CACHE_FILE_MAX_BYTES)
        except FileNotFoundError:
            return ()
        except OSError as error:
            logger.warning("cached peers in %s cannot be read: %s; going on without", self.path, error)
            return ()
        try:
            content = wire.decode(data, CacheFile, max_bytes=limits.PEER_CACHE_FILE_MAX_BYTES)
            if content.version != VERSION or content.mesh_tag != self._mesh_tag:
                raise VersionError(f"it is of version {content.version} or of another mesh")
        except ProtocolError as error:
            set_aside(self.path, str(error))
            return ()
        now = self._clock.wall_time()
        # What is dated in the future was written under a wrong clock.
        young = [p for p in content.peers if abs(now - p.seen_at) < limits.PEER_CACHE_MAX_AGE_S]
        return tuple(sorted(young, key=lambda peer: -peer.seen_at))

    def save(self, seen: Sequence[CachedPeer], *, unreachable: frozenset[PeerId] = frozenset()) -> None:
        """Add ``seen`` to what is cached, without the ``unreachable``. Logs instead of raising."""
        peers = {peer.peer_id: peer for peer in self.load() if peer.peer_id not in unreachable}
        for peer in seen:
            known = peers.get(peer.peer_id)
            if known is None or known.seen_at <= peer.seen_at:
                peers[peer.peer_id] = peer
        newest = sorted(peers.values(), key=lambda peer: -peer.seen_at)[: limits.PEER_CACHE_PEERS_MAX_COUNT]
        data = wire.encode(CacheFile(version=VERSION, mesh_tag=self._mesh_tag, peers=tuple(newest)))
        try:
            if not newest:
                self.path.unlink(missing_ok=True)
                return
            make_private_folder(self._folder)
            write_private(self.path, data, self._entropy)
            self._prune()
        except OSError as error:
            logger.warning("peers cannot be cached in %s: %s; going on without", self.path, error)

    def _prune(self) -> None:
        """Keep the files of the meshes used last."""
        files = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    files.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.path))
        files.sort(reverse=True)
        for _, path in files[limits.PEER_CACHE_FILES_MAX_COUNT :]:
            Path(path).unlink(missing_ok=True)
