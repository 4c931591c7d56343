"""Connected streams and links on loopback, and fabrics in one process whose raw port is a real one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from sparkle_mesh.fabric.interface import RawHandler
from sparkle_mesh.fabric.memory import MemoryFabric, MemoryFabricNetwork
from sparkle_mesh.transport.ciphers import AES_256_GCM
from sparkle_mesh.transport.records import RecordOpener, RecordSealer
from sparkle_mesh.transport.striped import StripedTcpLink
from sparkle_mesh.transport.tcp import TcpLink

THERE, BACK = b"t" * 32, b"b" * 32


@asynccontextmanager
async def _stream_pair() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        one = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        other = await listener.accept()
    async with one, other:
        yield one, other


@pytest.fixture
def stream_pair() -> Callable[[], AbstractAsyncContextManager[tuple[trio.SocketStream, trio.SocketStream]]]:
    """Two connected TCP streams, as an async context manager."""
    return _stream_pair


@pytest.fixture
def tcp_pair() -> Callable[..., AbstractAsyncContextManager[tuple[TcpLink, TcpLink]]]:
    """Two connected TCP links with fixed keys, as an async context manager."""

    @asynccontextmanager
    async def make(cipher: str = AES_256_GCM, streams: int = 1) -> AsyncIterator[tuple[TcpLink, TcpLink]]:
        if streams > 1:
            async with _striped_pair(cipher, streams) as pair:
                yield pair
            return
        async with _stream_pair() as (a, b):
            one = TcpLink(a, "b", RecordSealer(cipher, THERE), RecordOpener(cipher, BACK), latency_s=0.5)
            other = TcpLink(b, "a", RecordSealer(cipher, BACK), RecordOpener(cipher, THERE))
            try:
                yield one, other
            finally:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(one.aclose)
                    nursery.start_soon(other.aclose)

    return make


Records = tuple[trio.SocketStream, RecordSealer, RecordOpener]


def records_of(stream: trio.SocketStream, number: int, keys: tuple[bytes, bytes], cipher: str = AES_256_GCM) -> Records:
    """``stream``, with a sealer and an opener of this stream's own keys."""
    mine, theirs = (bytes([key[0], number]) * 16 for key in keys)
    placed = number > 0
    return stream, RecordSealer(cipher, mine, placed=placed), RecordOpener(cipher, theirs, placed=placed)


@asynccontextmanager
async def _stream_pairs(count: int) -> AsyncIterator[list[tuple[trio.SocketStream, trio.SocketStream]]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(_stream_pair()) for _ in range(count)]


@asynccontextmanager
async def _striped_pair(cipher: str, count: int) -> AsyncIterator[tuple[TcpLink, TcpLink]]:
    async with _stream_pairs(count) as pairs:
        here = [records_of(pair[0], number, (THERE, BACK), cipher) for number, pair in enumerate(pairs)]
        there = [records_of(pair[1], number, (BACK, THERE), cipher) for number, pair in enumerate(pairs)]
        one, other = StripedTcpLink(here, "b", latency_s=0.5), StripedTcpLink(there, "a")
        try:
            yield one, other
        finally:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.aclose)
                nursery.start_soon(other.aclose)


@pytest.fixture
def striped_wire() -> Callable[..., AbstractAsyncContextManager[tuple[list[Records], StripedTcpLink]]]:
    """The raw streams of a hostile peer with their sealers and openers, and the link at the other end."""

    @asynccontextmanager
    async def make(count: int = 3) -> AsyncIterator[tuple[list[Records], StripedTcpLink]]:
        async with _stream_pairs(count) as pairs:
            raw = [records_of(pair[0], number, (THERE, BACK)) for number, pair in enumerate(pairs)]
            link = StripedTcpLink(
                [records_of(pair[1], number, (BACK, THERE)) for number, pair in enumerate(pairs)], "mallory"
            )
            try:
                yield raw, link
            finally:
                for stream, _, _ in raw:
                    await stream.aclose()
                await link.aclose()

    return make


@pytest.fixture
def wire_pair() -> Callable[..., AbstractAsyncContextManager[tuple[trio.SocketStream, RecordSealer, TcpLink]]]:
    """A raw stream, the sealer of its direction, and the link at the other end: for a hostile peer."""

    @asynccontextmanager
    async def make() -> AsyncIterator[tuple[trio.SocketStream, RecordSealer, TcpLink]]:
        async with _stream_pair() as (raw, stream):
            link = TcpLink(stream, "mallory", RecordSealer(AES_256_GCM, BACK), RecordOpener(AES_256_GCM, THERE))
            try:
                yield raw, RecordSealer(AES_256_GCM, THERE), link
            finally:
                await raw.aclose()
                await link.aclose()

    return make


class PortedFabric:
    """A memory fabric with a real listening port for raw connections."""

    def __init__(self, fabric: MemoryFabric) -> None:
        self._fabric = fabric
        self._handlers: dict[bytes, RawHandler] = {}
        self.addresses: tuple[str, ...] = ()
        self.refused: list[Exception] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fabric, name)

    def handle_raw(self, magic: bytes, handler: RawHandler) -> None:
        self._handlers[magic] = handler

    async def listen(self, nursery: trio.Nursery, host: str = "127.0.0.1") -> None:
        (listener,) = await trio.open_tcp_listeners(0, host=host)
        self.addresses = (f"/ip{6 if ':' in host else 4}/{host}/tcp/{listener.socket.getsockname()[1]}",)
        nursery.start_soon(trio.serve_listeners, self._serve, [listener])

    async def _serve(self, stream: trio.SocketStream) -> None:
        (handler,) = self._handlers.values()
        try:
            await handler(stream)
        except Exception as error:
            self.refused.append(error)
            await trio.aclose_forcefully(stream)


@pytest.fixture
def open_fabrics() -> Callable[..., AbstractAsyncContextManager[list[PortedFabric]]]:
    """``count`` connected fabrics with real raw ports, in the order of their peer ids."""

    @asynccontextmanager
    async def make(
        count: int = 2, *, connect: bool = True, host: str = "127.0.0.1"
    ) -> AsyncIterator[list[PortedFabric]]:
        network = MemoryFabricNetwork()
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as opening:
                fabrics: list[PortedFabric] = []
                done = trio.Event()

                async def run() -> None:
                    async with network.open() as fabric:
                        fabrics.append(PortedFabric(fabric))
                        await done.wait()

                for _ in range(count):
                    opening.start_soon(run)
                await trio.testing.wait_all_tasks_blocked()
                fabrics.sort(key=lambda fabric: str(fabric.peer_id))
                for fabric in fabrics:
                    await fabric.listen(nursery, host)
                if connect:
                    for number, fabric in enumerate(fabrics):
                        for other in fabrics[number + 1 :]:
                            await fabric.connect(other.peer_id, other._fabric.addresses)
                try:
                    yield fabrics
                finally:
                    done.set()
            nursery.cancel_scope.cancel()

    return make
