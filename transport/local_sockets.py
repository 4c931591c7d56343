"""Unix-domain sockets between processes of one host and user: how they meet to share memory.

The listener's name is random and, on Linux, abstract: no file is left behind by any kind of death. Elsewhere it is a
file in a fresh folder that only this user can enter. The peer's user id is asked of the kernel; who the peer is, the
handshake proves.
"""

from __future__ import annotations

import array
import os
import re
import socket
import struct
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import Entropy
from sparkle_mesh.errors import AuthenticationError, ProtocolError

_ABSTRACT: Final = "@"
_ABSTRACT_ADDRESS: Final = re.compile("@sparkle-[0-9a-f]{32}")
_UCRED: Final = struct.Struct("3i")
_HAS_SOCKETS: Final = hasattr(socket, "AF_UNIX") and hasattr(socket, "SCM_RIGHTS")


def can_meet_locally() -> bool:
    """Whether this platform has what it takes."""
    return _HAS_SOCKETS


class LocalListener:
    """A listening Unix-domain socket; ``address`` is what to give to :func:`connect_local`. A context manager."""

    def __init__(self, entropy: Entropy) -> None:
        self._sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        name = f"sparkle-{entropy.token(16).hex()}"
        self.address = f"{_ABSTRACT}{name}"
        self._name = f"\0{name}"
        if sys.platform != "linux":  # pragma: no cover - abstract names are Linux's own
            self._folder = tempfile.TemporaryDirectory(prefix="sparkle-")
            self.address = self._name = str(Path(self._folder.name) / "link")

    async def __aenter__(self) -> Self:
        await self._sock.bind(self._name)
        self._sock.listen(limits.LISTEN_BACKLOG_COUNT)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def accept(self) -> trio.socket.SocketType:
        """Return the next connection of this user; others are closed."""
        while True:
            sock, _ = await self._sock.accept()
            if peer_process(sock) is not None:
                return sock
            sock.close()

    def close(self) -> None:
        """Listen no longer. Idempotent."""
        self._sock.close()
        if self._folder is not None:  # pragma: no cover - abstract names are Linux's own
            self._folder.cleanup()

    def close_in_child(self) -> None:
        """In a forked child: close the inherited descriptor. Never raises."""
        descriptor = self._sock.detach()
        if descriptor >= 0:
            os.close(descriptor)


async def connect_local(address: str) -> trio.socket.SocketType:
    """Connect to the :class:`LocalListener` at ``address``.

    Raises
    ------
    OSError
        If nobody listens there.
    AuthenticationError
        If it is another user who does.
    ProtocolError
        If no such listener has that address: a peer must not make this process talk to just any local socket.
    """
    if sys.platform == "linux" and not _ABSTRACT_ADDRESS.fullmatch(address):
        raise ProtocolError("the local address that the peer gave is none")
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await sock.connect(f"\0{address[1:]}" if address.startswith(_ABSTRACT) else address)
        if peer_process(sock) is None:
            raise AuthenticationError("another user listens at the local address that the peer gave")
    except BaseException:
        sock.close()
        raise
    return sock


def peer_process(sock: trio.socket.SocketType) -> int | None:
    """Return the process id at the other end of ``sock``, 0 if unknown; None if it is another user's."""
    if sys.platform == "linux":
        pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return pid if uid == os.geteuid() else None
    return 0  # pragma: no cover - the listener's folder keeps other users out


async def send_descriptors(sock: trio.socket.SocketType, descriptors: list[int]) -> None:
    """Send copies of open file descriptors, with one byte of data."""
    rights = array.array("i", descriptors).tobytes()
    await sock.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


async def receive_descriptors(sock: trio.socket.SocketType, count: int) -> list[int]:
    """Return the ``count`` descriptors that :func:`send_descriptors` sent; the caller closes them.

    Raises
    ------
    ProtocolError
        If something else came.
    """
    item = array.array("i")
    room = socket.CMSG_SPACE(count * item.itemsize)
    data, ancillary, flags, _ = await sock.recvmsg(1, room, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
    for level, kind, rights in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            item.frombytes(rights[: len(rights) - len(rights) % item.itemsize])
    if len(item) != count or data != b"\0" or flags & socket.MSG_CTRUNC:
        for descriptor in item:
            os.close(descriptor)
        raise ProtocolError(f"{len(item)} descriptors came over a local socket where {count} belong")
    return list(item)
