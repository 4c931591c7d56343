"""Links between processes of one host and user: messages over a Unix-domain socket, and each other's memory.

Beside the pipe, either end can read what the other has put into its arena (:mod:`.arena`), and where the system
permits it any of its memory (:mod:`.cross_memory`); and it can ring the other's bell, to say that there is something
new to read. That is what collectives among the ranks of one host are made of: operands are read where they lie.

Nothing is encrypted: it does not leave the host, and whoever could read it could read both processes.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import Entropy
from sparkle_mesh.errors import LinkClosedError, ProtocolError, SparkleError, UnreachableError
from sparkle_mesh.transport.arena import Arena, PeerArena
from sparkle_mesh.transport.cross_memory import can_read, read_memory
from sparkle_mesh.transport.framed import FramedLink
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.local_sockets import (
    LocalListener,
    can_meet_locally,
    peer_process,
    receive_descriptors,
    send_descriptors,
)

_RING: Final = (1).to_bytes(8, sys.byteorder)
_RINGS_READ_BYTES: Final = 4096
_NO_SIGNAL: Final = getattr(socket, "MSG_NOSIGNAL", 0)


class SharedMemory:
    """What this process shares with others on this host: its arena, its bell, and the address at which they meet.

    Attributes
    ----------
    arena
        What others can read.
    bell
        A descriptor that becomes readable when a peer rings; :meth:`quiet` makes it wait for the next one.
    """

    def __init__(self, entropy: Entropy) -> None:
        self.arena = Arena(entropy)
        self.bell, self._ringer = _make_bell()
        self._listener = LocalListener(entropy)
        self._serving = trio.CancelScope()

    @classmethod
    def open(cls, entropy: Entropy) -> SharedMemory | None:
        """Return it, or None where the system does not give what it takes."""
        if not can_meet_locally():
            return None
        try:
            return cls(entropy)
        except (UnreachableError, OSError):
            return None

    @property
    def address(self) -> str:
        """Where peers connect to."""
        return self._listener.address

    async def serve(
        self,
        serve_stream: Callable[[trio.SocketStream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Hand connections to ``serve_stream`` until closed; one that fails is closed."""

        async def serve_one(sock: trio.socket.SocketType) -> None:
            try:
                await serve_stream(trio.SocketStream(sock))
            except (SparkleError, OSError, trio.BrokenResourceError, trio.TooSlowError):
                # Whoever it was learns it from the end of the connection.
                pass
            finally:
                # Does nothing if a link took it over.
                sock.close()
                slots.release()

        slots = trio.Semaphore(limits.UNPROVEN_SOCKETS_MAX_COUNT)
        async with self._listener, trio.open_nursery() as nursery:
            self._serving = nursery.cancel_scope
            task_status.started()
            while True:
                await slots.acquire()
                nursery.start_soon(serve_one, await self._listener.accept())

    async def share(
        self, stream: trio.SocketStream, peer_id: str, on_released: Callable[[Link], None] | None = None
    ) -> SharedMemoryLink:
        """Make a link of a connection at whose other end the peer, proven to be ``peer_id``, calls this too.

        Raises
        ------
        ProtocolError, UnreachableError, LinkClosedError, OSError
            If it does not come about.
        """
        asked_at = trio.current_time()
        arena = self.arena.open_for_reading()
        try:
            await send_descriptors(stream.socket, [arena, self._ringer])
        finally:
            os.close(arena)
        arena, bell = await receive_descriptors(stream.socket, 2)
        latency_s = (trio.current_time() - asked_at) / 2
        try:
            _check_bell(bell)
            peer = PeerMemory(PeerArena(arena), bell, peer_process(stream.socket) or 0)
        except BaseException:
            os.close(bell)
            raise
        finally:
            os.close(arena)
        return SharedMemoryLink(stream, peer_id, peer, latency_s=latency_s, on_released=on_released)

    def quiet(self) -> None:
        """Forget the rings that were heard."""
        with suppress(BlockingIOError):
            while os.read(self.bell, _RINGS_READ_BYTES) and self.bell != self._ringer:
                pass  # a pipe may hold more than that

    def ring_own_bell(self) -> None:
        """Wake whoever waits for :attr:`bell`."""
        _ring(self._ringer)

    def close(self) -> None:
        """Let go of everything. Arrays in the arena stay usable here. Idempotent."""
        self._serving.cancel()
        self._listener.close()
        self._close_descriptors()

    def close_in_child(self) -> None:
        """In a forked child: release inherited descriptors. Never raises."""
        self._listener.close_in_child()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        self.arena.close()
        for descriptor in {self.bell, self._ringer} - {-1}:
            os.close(descriptor)
        self.bell = self._ringer = -1


class PeerMemory:
    """A peer's memory as this process can read it."""

    def __init__(self, arena: PeerArena, bell: int, pid: int) -> None:
        self.arena = arena
        self._bell = bell
        self._pid = pid
        #: Whether memory outside its arena can be read, too.
        self.readable = pid > 0 and can_read(pid, arena.probe_address, arena.probe)

    def read(self, address: int, out: np.ndarray[Any, np.dtype[Any]]) -> None:
        """Fill the contiguous array ``out`` from the peer's memory at ``address``.

        Raises
        ------
        LinkClosedError
            If it is not there (any more).
        """
        read_memory(self._pid, address, out)

    def ring(self) -> None:
        """Wake the peer if it waits for its bell."""
        _ring(self._bell)

    def close(self) -> None:
        """Let go of the bell, and of the arena once nothing refers to what is in it. Idempotent."""
        self.arena.close()
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1


class SharedMemoryLink(FramedLink):
    """A link to a peer whose memory can be read: ``memory``."""

    def __init__(
        self,
        stream: trio.SocketStream,
        peer_id: str,
        memory: PeerMemory,
        *,
        latency_s: float | None = None,
        on_released: Callable[[Link], None] | None = None,
    ) -> None:
        super().__init__(
            SocketBytes(stream), peer_id, kind="shared_memory", latency_s=latency_s, on_released=on_released
        )
        self.memory = memory

    def _release(self) -> None:
        self.memory.close()
        super()._release()

    def close_in_child(self) -> None:
        super().close_in_child()
        self.memory.close()


class SocketBytes:
    """A connected socket as a :class:`~.framed.ByteStream`. A system call is tried before it is waited for."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._sock = socket.socket(fileno=stream.socket.detach())
        self._sock.setblocking(False)
        self._closed = False

    async def send_all(self, buffers: list[memoryview]) -> None:
        index = offset = 0
        while index < len(buffers):
            pieces = [buffers[index][offset:], *buffers[index + 1 : index + limits.SENDMSG_BUFFERS_MAX_COUNT]]
            try:
                sent = self._sock.sendmsg(pieces, (), _NO_SIGNAL)
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_writable)
                continue
            except OSError as error:
                raise LinkClosedError(error.strerror or str(error)) from error
            offset += sent
            while index < len(buffers) and offset >= len(buffers[index]):
                offset -= len(buffers[index])
                index += 1

    async def receive_some_into(self, view: memoryview) -> int:
        while True:
            try:
                return self._sock.recv_into(view)
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_readable)
            except OSError as error:
                raise LinkClosedError(error.strerror or str(error)) from error

    async def _wait(self, ready: Callable[[socket.socket], Awaitable[None]]) -> None:
        try:
            await ready(self._sock)
        except trio.ClosedResourceError:
            raise LinkClosedError("it was closed here") from None

    async def aclose(self) -> None:
        # What was sent lies in the peer's queue already.
        self.abort()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    def close_in_child(self) -> None:
        self._closed = True
        descriptor = self._sock.detach()
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)


def _check_bell(descriptor: int) -> None:
    """Refuse what is no bell: writing to anything else could do more than ring.

    Raises
    ------
    ProtocolError
    """
    if _has_event_descriptors():
        what = Path(f"/proc/self/fd/{descriptor}").readlink().name
        fits = what == "anon_inode:[eventfd]"
    else:
        mode = os.fstat(descriptor).st_mode
        what, fits = stat.filemode(mode), stat.S_ISFIFO(mode)
    if not fits:
        raise ProtocolError(f"a peer sent {what!r} as its bell")
    os.set_blocking(descriptor, False)


def _has_event_descriptors() -> bool:
    return sys.platform == "linux" and hasattr(os, "eventfd")


def _make_bell() -> tuple[int, int]:
    """Return the descriptors to listen to, and to ring by; they may be one."""
    if _has_event_descriptors():
        bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return bell, bell
    bell, ringer = os.pipe()
    os.set_blocking(bell, False)
    os.set_blocking(ringer, False)
    return bell, ringer


def _ring(bell: int) -> None:
    # A full counter (BlockingIOError) has woken the peer already; without a descriptor, or a reader, there is nobody.
    if bell >= 0:
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(bell, _RING)
