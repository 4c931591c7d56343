"""The node's control socket: its place, its messages, and the commands' side of it.

A Unix domain socket in a directory that only its owner can enter. One request and one reply per connection,
each a 4-byte big-endian length and a MessagePack message. The node's side is
:mod:`sparkle_mesh.cli.control_server`; this side is plain blocking sockets, so that a command needs neither
trio nor libp2p and answers at once.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.capabilities.search import DeviceQuery, FoundDevice
from sparkle_mesh.cli.lock import running_pid
from sparkle_mesh.clock import SYSTEM_CLOCK
from sparkle_mesh.errors import DeadlineError, NodeBusyError, NoNodeError, UsageError
from sparkle_mesh.status import NodeStatus, PeerStatus, RevocationStatus

VERSION = 1
LENGTH_BYTES = 4
SOCKET_NAME = "control.sock"

Command: TypeAlias = Literal["status", "peers", "devices", "invite", "revoke"]


class ControlRequest(wire.Message, frozen=True, kw_only=True):
    """What a command asks of the node. A node refuses versions and commands it does not know."""

    version: int
    command: wire.NameText
    devices: DeviceQuery | None = None
    revoke: wire.PeerIdText | None = None


class ControlReply(wire.Message, frozen=True, kw_only=True):
    """The node's answer: the field that the command names, or ``error``."""

    version: int
    error: wire.ReasonText | None = None
    status: NodeStatus | None = None
    peers: Annotated[tuple[PeerStatus, ...], msgspec.Meta(max_length=limits.MESH_PEERS_MAX_COUNT)] | None = None
    devices: Annotated[tuple[FoundDevice, ...], msgspec.Meta(max_length=limits.FOUND_DEVICES_MAX_COUNT)] | None = None
    invite: Annotated[str, msgspec.Meta(max_length=limits.CONTROL_MESSAGE_MAX_BYTES)] | None = None
    revoke: RevocationStatus | None = None


def control_supported() -> bool:
    """Whether this platform has what the control socket needs."""
    return hasattr(socket, "AF_UNIX")


def run_dir(data_dir: Path) -> Path:
    """Return where the socket of a node with this data directory is."""
    return data_dir / "run"


@contextmanager
def socket_address(directory: Path) -> Iterator[str]:
    """Yield a name for the socket in ``directory`` that fits a socket address.

    Paths over the system's limit (108 bytes with the final zero on Linux, 104 elsewhere) go through
    ``/proc/self/fd``, where a directory held open has a short name.

    Raises
    ------
    UsageError
        If the path is too long and there is no ``/proc``.
    FileNotFoundError
        If the path is too long and ``directory`` does not exist.
    """
    path = directory / SOCKET_NAME
    longest = 107 if sys.platform == "linux" else 103
    if len(os.fsencode(path)) <= longest:
        yield str(path)
        return
    if not Path("/proc/self/fd").is_dir():  # pragma: no cover (macOS)
        raise UsageError(f"{path} is too long for a socket (over {longest} bytes); choose a shorter data directory")
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"
    finally:
        os.close(descriptor)


def make_run_dir(data_dir: Path) -> Path:
    """Create the socket's directory, or make sure that the one there is ours alone.

    Raises
    ------
    UsageError
        If it is not a directory, is somebody else's, or cannot be made.
    """
    directory = run_dir(data_dir)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise UsageError(f"{directory} is not a directory of this user's own; move it away")
        if status.st_mode & 0o077:
            directory.chmod(0o700)
    except OSError as error:
        raise UsageError(f"{directory} cannot be made: {error.strerror}; choose another data directory") from error
    return directory


def ask(
    data_dir: Path,
    command: Command,
    *,
    devices: DeviceQuery | None = None,
    revoke: str | None = None,
    timeout_s: float = limits.CONTROL_ASK_TIMEOUT_S,
    wait_s: float = 0.0,
) -> ControlReply:
    """Ask the node that runs on ``data_dir``; blocks. A node that is just starting is awaited.

    Parameters
    ----------
    devices
        What the command ``"devices"`` looks for.
    revoke
        Whom the command ``"revoke"`` is about.
    wait_s
        For how long a node may be missing altogether; ``timeout_s`` comes on top of it.

    Raises
    ------
    NoNodeError
        If no node runs there, or it does not come up within ``timeout_s``.
    DeadlineError
        If the node took the question and gave no answer within ``timeout_s``.
    NodeBusyError
        If the node refused; the message is its own.
    ProtocolError
        If what answered is not a node.
    """
    if not control_supported():  # pragma: no cover (Windows)
        raise NoNodeError("this platform has no Unix domain sockets, so a running node cannot be asked")
    patient_until = SYSTEM_CLOCK.now() + wait_s
    deadline = patient_until + timeout_s
    with _connect(data_dir, patient_until, deadline) as connection:
        request = wire.encode(ControlRequest(version=VERSION, command=command, devices=devices, revoke=revoke))
        try:
            # A node that refuses may do so before it has read: the reason is then still there to be read.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(len(request).to_bytes(LENGTH_BYTES, "big") + request)
            length = int.from_bytes(_receive(connection, LENGTH_BYTES, deadline), "big")
            if length > limits.CONTROL_REPLY_MAX_BYTES:
                raise NodeBusyError(f"the node announced an answer of {length} bytes; is it another version's?")
            reply = wire.decode(
                _receive(connection, length, deadline), ControlReply, max_bytes=limits.CONTROL_REPLY_MAX_BYTES
            )
        except TimeoutError as error:
            raise DeadlineError(f"the node on {data_dir} did not answer within {timeout_s:g} s") from error
        except ConnectionError as error:
            raise NodeBusyError(f"the node on {data_dir} closed the connection without an answer") from error
    if reply.error is not None:
        raise NodeBusyError(f"the node answers: {reply.error}")
    if getattr(reply, command) is None:
        raise NodeBusyError(f"the node's answer holds no {command}; is it another version's?")
    return reply


def _connect(data_dir: Path, patient_until: float, deadline: float) -> socket.socket:
    begun = SYSTEM_CLOCK.now()
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(deadline - SYSTEM_CLOCK.now(), limits.CONTROL_POLL_INTERVAL_S))
            with socket_address(run_dir(data_dir)) as address:
                connection.connect(address)
            return connection
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
            connection.close()
            pid = running_pid(data_dir)
            now = SYSTEM_CLOCK.now()
            if pid is None and now >= patient_until:
                raise NoNodeError(f"no node runs on {data_dir}; start one with `sparkle-node`") from error
            if now >= deadline:
                raise NoNodeError(
                    f"no node answers on {data_dir} within {deadline - begun:.3g} s "
                    f"(process {pid} is starting, or stuck)"
                ) from error
            time.sleep(limits.CONTROL_POLL_INTERVAL_S)
        except OSError as error:
            connection.close()
            raise NoNodeError(f"the node on {data_dir} cannot be asked: {error.strerror}") from error


def _receive(connection: socket.socket, nbytes: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < nbytes:
        remaining_s = deadline - SYSTEM_CLOCK.now()
        if remaining_s <= 0:
            raise TimeoutError
        connection.settimeout(remaining_s)
        piece = connection.recv(min(nbytes - len(received), limits.MIB))
        if not piece:
            raise ConnectionResetError
        received += piece
    return bytes(received)
