"""Fixtures of the fabric's tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

import pytest
import trio

from sparkle_mesh.errors import LinkClosedError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric
from sparkle_mesh.fabric.memory import MemoryFabricNetwork

OpenFabric: TypeAlias = Callable[[], AbstractAsyncContextManager[Any]]


class ScriptedStream:
    """A ``FabricStream`` that reads from given bytes, at most ``piece`` at a time, and keeps what is written."""

    peer_id = "scripted-peer"

    def __init__(self, data: bytes = b"", piece: int = 1 << 20) -> None:
        self.data = data
        self.piece = piece
        self.written = b""
        self.largest_read = 0
        self.closed = False

    async def read(self, max_bytes: int) -> bytes:
        self.largest_read = max(self.largest_read, max_bytes)
        count = min(max_bytes, self.piece)
        data, self.data = self.data[:count], self.data[count:]
        return data

    async def write(self, data: bytes) -> None:
        if self.closed:
            raise LinkClosedError("closed")
        self.written += data

    async def aclose(self) -> None:
        self.closed = True

    async def reset(self) -> None:
        self.closed = True


@pytest.fixture
def scripted_stream() -> type[ScriptedStream]:
    return ScriptedStream


@pytest.fixture(params=["memory", "libp2p"])
def open_fabric(request: pytest.FixtureRequest) -> OpenFabric:
    """Opens one more fabric, of either kind, that can reach the others of the test."""
    if request.param == "memory":
        return MemoryFabricNetwork().open
    return lambda: open_libp2p_fabric(Identity.generate())


@pytest.fixture
async def pair(open_fabric):
    """Two connected fabrics, the first of which dialed."""
    with trio.fail_after(30):
        async with open_fabric() as one, open_fabric() as other:
            await one.connect(other.peer_id, other.addresses)
            yield one, other


@pytest.fixture
async def libp2p_pair():
    with trio.fail_after(30):
        async with open_libp2p_fabric(Identity.generate()) as one, open_libp2p_fabric(Identity.generate()) as other:
            await one.connect(other.peer_id, other.addresses)
            yield one, other


@pytest.fixture
def echo():
    """A stream handler that sends back what it reads."""

    async def handler(stream) -> None:
        while data := await stream.read(100_000):
            await stream.write(data)
        await stream.aclose()

    return handler


@pytest.fixture
def check_serving():
    """Asserts that ``server`` still serves ``client`` on ``/echo``."""

    async def check(client, server) -> None:
        with trio.fail_after(10):
            await client.connect(server.peer_id, server.addresses)
            stream = await client.open_stream(server.peer_id, "/echo")
            await stream.write(b"still there?")
            assert await stream.read(100) == b"still there?"
            await stream.aclose()

    return check
