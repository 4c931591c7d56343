"""The node's side of its control socket (see :mod:`sparkle_mesh.cli.control`)."""

from __future__ import annotations

import logging
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import trio

from sparkle_mesh import limits, wire
from sparkle_mesh.capabilities.search import DeviceQuery, FoundDevice
from sparkle_mesh.cli.control import (
    LENGTH_BYTES,
    SOCKET_NAME,
    VERSION,
    ControlReply,
    ControlRequest,
    make_run_dir,
    socket_address,
)
from sparkle_mesh.errors import ProtocolError, SparkleError, UsageError
from sparkle_mesh.status import NodeStatus, PeerStatus, RevocationStatus

logger = logging.getLogger(__name__)

_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred, unix(7)


class ControlHandler(Protocol):
    """What answers: a node."""

    def status(self) -> NodeStatus: ...

    def peers(self) -> Sequence[PeerStatus]: ...

    def invite(self) -> str: ...

    def revoke(self, peer_id: str) -> RevocationStatus: ...

    async def find_devices(self, query: DeviceQuery) -> Sequence[FoundDevice]: ...


async def serve_control(
    handler: ControlHandler,
    data_dir: Path,
    *,
    owner_uid: int | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer commands until cancelled; the socket is removed then.

    The caller holds the data directory (:func:`sparkle_mesh.cli.lock.hold_data_dir`): a socket found there
    is a dead node's and is replaced. Garbage, silence and floods cost only the client they come from.

    Parameters
    ----------
    owner_uid
        The user whose processes may ask; by default the one this process runs as.

    Raises
    ------
    UsageError
        If the socket cannot be made there.
    """
    server = _Server(handler, os.geteuid() if owner_uid is None else owner_uid)
    with _listening_socket(data_dir) as listener:
        task_status.started()
        await trio.serve_listeners(server.serve, [trio.SocketListener(listener)])


class _Server:
    def __init__(self, handler: ControlHandler, owner_uid: int) -> None:
        self._handler = handler
        self._owner_uid = owner_uid
        self._client_count = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        self._client_count += 1
        try:
            async with stream:
                with trio.move_on_after(limits.CONTROL_CLIENT_TIMEOUT_S) as deadline:
                    await _send(stream, await self._answer(stream))
                if deadline.cancelled_caught:
                    logger.debug("a control client was given up after %s s", limits.CONTROL_CLIENT_TIMEOUT_S)
        except (trio.BrokenResourceError, ProtocolError) as error:
            logger.debug("a control client was let go: %s", error)
        finally:
            self._client_count -= 1

    async def _answer(self, stream: trio.SocketStream) -> ControlReply:
        if self._client_count > limits.CONTROL_CLIENTS_MAX_COUNT:
            return _refusal(f"{limits.CONTROL_CLIENTS_MAX_COUNT} commands are being answered; try again")
        uid = peer_uid(stream.socket)
        if uid is not None and uid != self._owner_uid:
            logger.warning("a process of user id %d was refused on the control socket", uid)
            return _refusal("this node belongs to another user")
        try:
            request = await _receive_request(stream)
        except ProtocolError as error:
            return _refusal(str(error))
        return await self._reply_to(request)

    async def _reply_to(self, request: ControlRequest) -> ControlReply:
        if request.version != VERSION:
            return _refusal(f"it speaks version {VERSION} of its control protocol, not {request.version}")
        try:
            match request.command:
                case "status":
                    return ControlReply(version=VERSION, status=self._handler.status())
                case "peers":
                    peers = tuple(self._handler.peers())[: limits.MESH_PEERS_MAX_COUNT]
                    return ControlReply(version=VERSION, peers=peers)
                case "devices":
                    query = (request.devices or DeviceQuery.of()).checked()
                    found = tuple(await self._handler.find_devices(query))
                    return ControlReply(version=VERSION, devices=found)
                case "invite":
                    return ControlReply(version=VERSION, invite=self._handler.invite())
                case "revoke":
                    return ControlReply(version=VERSION, revoke=self._handler.revoke(request.revoke or ""))
                case unknown:
                    return _refusal(f"it does not know the command {unknown!r}")
        except SparkleError as error:
            return _refusal(str(error))


def peer_uid(connection: trio.socket.SocketType) -> int | None:
    """Return the user id of the process at the other end; None where the system does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):  # pragma: no cover (macOS: the directory's mode alone guards)
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return int(_PEER_CREDENTIALS.unpack(credentials)[1])


def _refusal(reason: str) -> ControlReply:
    return ControlReply(version=VERSION, error=reason[: limits.REASON_MAX_CHARS])


async def _receive_request(stream: trio.SocketStream) -> ControlRequest:
    length = int.from_bytes(await _receive_exactly(stream, LENGTH_BYTES), "big")
    if length > limits.CONTROL_REQUEST_MAX_BYTES:
        raise ProtocolError(f"a request of {length} bytes is over the limit of {limits.CONTROL_REQUEST_MAX_BYTES}")
    return wire.decode(await _receive_exactly(stream, length), ControlRequest)


async def _receive_exactly(stream: trio.SocketStream, nbytes: int) -> bytes:
    received = bytearray()
    while len(received) < nbytes:
        piece = await stream.receive_some(nbytes - len(received))
        if not piece:
            raise ProtocolError(f"the request ended after {len(received)} of {nbytes} bytes")
        received += piece
    return bytes(received)


async def _send(stream: trio.SocketStream, reply: ControlReply) -> None:
    encoded = wire.encode(reply)
    if len(encoded) > limits.CONTROL_REPLY_MAX_BYTES:
        encoded = wire.encode(_refusal(f"its answer of {len(encoded)} bytes is too long to send"))
    await stream.send_all(len(encoded).to_bytes(LENGTH_BYTES, "big") + encoded)


@contextmanager
def _listening_socket(data_dir: Path) -> Iterator[trio.socket.SocketType]:
    directory = make_run_dir(data_dir)
    path = directory / SOCKET_NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.setblocking(False)
        try:
            if path.is_symlink() or path.exists():
                if not stat.S_ISSOCK(path.lstat().st_mode):
                    raise UsageError(f"{path} is in the way of the control socket and is not one; move it away")
                path.unlink()
            with socket_address(directory) as address:
                listener.bind(address)
            path.chmod(0o600)
            listener.listen(limits.CONTROL_BACKLOG_MAX_COUNT)
        except OSError as error:
            raise UsageError(f"control socket {path} cannot be made: {error.strerror}") from error
        try:
            yield trio.socket.from_stdlib_socket(listener)
        finally:
            path.unlink(missing_ok=True)
