"""A peer of go-libp2p: the daemon ``p2pd`` that the hivemind wheel carries, and its control socket."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparkle_mesh.fabric.protobuf import encode_varint


def _wheel() -> Path | None:
    spec = importlib.util.find_spec("hivemind")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(places[0]) if places else None


def daemon_path() -> Path | None:
    """Return where the daemon is; None where its wheel is not installed."""
    wheel = _wheel()
    path = wheel / "hivemind_cli" / "p2pd" if wheel is not None else None
    return path if path is not None and os.access(path, os.X_OK) else None


needs_go = pytest.mark.skipif(
    daemon_path() is None, reason="needs p2pd: `make setup` installs the wheel that carries it, on Linux with x86-64"
)


def _messages() -> ModuleType:
    """Load the daemon's own message types; the package around them needs PyTorch."""
    wheel = _wheel()
    assert wheel is not None
    spec = importlib.util.spec_from_file_location("p2pd_pb2", wheel / "proto" / "p2pd_pb2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Control:
    """One connection to the daemon's control socket; blocking, with a deadline."""

    def __init__(self, path: Path) -> None:
        self._messages = _messages()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        self._socket.connect(str(path))
        self._rest = b""

    def close(self) -> None:
        self._socket.close()

    def ask(self, **fields: Any) -> Any:
        """Send one request and return the response."""
        request = self._messages.Request(**fields)
        body = request.SerializeToString()
        self._socket.sendall(encode_varint(len(body)) + body)
        response = self.receive(self._messages.Response)
        assert response.type == self._messages.Response.OK, response
        return response

    def pubsub(self, **fields: Any) -> Any:
        """Send a request about a topic."""
        request = self._messages.PSRequest(**fields)
        return self.ask(type=self._messages.Request.PUBSUB, pubsub=request)

    def publish(self, topic: str, data: bytes) -> None:
        self.pubsub(type=self._messages.PSRequest.PUBLISH, topic=topic, data=data)

    def subscribe(self, topic: str) -> None:
        """Turn this connection into one on which the topic's messages come."""
        self.pubsub(type=self._messages.PSRequest.SUBSCRIBE, topic=topic)

    def next_message(self) -> Any:
        return self.receive(self._messages.PSMessage)

    def receive(self, message_type: Any) -> Any:
        while True:
            start = next((place + 1 for place, byte in enumerate(self._rest) if byte < 0x80), None)
            if start is not None:
                length = sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(self._rest[:start]))
                if len(self._rest) >= start + length:
                    body, self._rest = self._rest[start : start + length], self._rest[start + length :]
                    message = message_type()
                    message.ParseFromString(body)
                    return message
            data = self._socket.recv(65536)
            assert data, "the daemon closed its control socket"
            self._rest += data


class GoPeer:
    """A running daemon: who it is, where it listens, and its control socket."""

    def __init__(self, process: subprocess.Popen[str], socket_path: Path) -> None:
        self.process, self._socket_path = process, socket_path
        self.peer_id, self.address = "", ""
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Peer ID:"):
                self.peer_id = line.split()[-1]
            if line.startswith("/ip4/") and self.peer_id:
                self.address = line.strip()
                return
        raise AssertionError("the daemon did not start")

    @property
    def bootstrap(self) -> str:
        """What to give as a bootstrap peer."""
        return f"{self.address}/p2p/{self.peer_id}"

    @contextmanager
    def control(self) -> Iterator[Control]:
        control = Control(self._socket_path)
        try:
            yield control
        finally:
            control.close()


def daemon_command(folder: Path, host_address: str = "/ip4/127.0.0.1/tcp/0", *options: str) -> list[str]:
    """Return the command that runs a daemon with the DHT and GossipSub; its control socket is in ``folder``."""
    path = daemon_path()
    assert path is not None
    return [str(path), "-listen", f"/unix{folder / 'p2pd.sock'}", "-hostAddrs", host_address, "-dhtServer", "-pubsub",
            *options]  # fmt: skip


@contextmanager
def go_peer(options: Sequence[str] = ()) -> Iterator[GoPeer]:
    """Run a daemon on loopback until the block ends."""
    # A socket's path may have a hundred characters, which tests' folders exceed.
    short = Path(tempfile.mkdtemp(prefix="sparkle-", dir="/tmp"))
    process = subprocess.Popen(
        daemon_command(short, "/ip4/127.0.0.1/tcp/0", *options),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield GoPeer(process, short / "p2pd.sock")
    finally:
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
        shutil.rmtree(short)
