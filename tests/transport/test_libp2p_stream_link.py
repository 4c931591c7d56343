"""Links over streams of real fabrics, and what else the control plane has to say meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sparkle_mesh import limits
from sparkle_mesh.errors import LinkClosedError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.interface import FabricStream
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric
from sparkle_mesh.transport.libp2p_stream import open_stream_link
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.testing import LINK_CHECKS, Check, run_check


@asynccontextmanager
async def fabrics_and_links() -> AsyncIterator[tuple[Any, Any, Link, Link]]:
    async with open_libp2p_fabric(Identity.generate()) as a, open_libp2p_fabric(Identity.generate()) as b:
        await a.connect(b.peer_id, b.addresses)
        served: dict[str, FabricStream] = {}
        came = trio.Event()

        async def serve(stream: FabricStream) -> None:
            served["link"] = stream
            came.set()

        async def echo(stream: FabricStream) -> None:
            while data := await stream.read(100):
                await stream.write(data)

        b.handle("/link", serve)
        b.handle("/echo", echo)
        stream = await a.open_stream(b.peer_id, "/link")
        await came.wait()
        one, other = await open_stream_link(stream), await open_stream_link(served["link"])
        try:
            yield a, b, one, other
        finally:
            await one.aclose()
            await other.aclose()


@asynccontextmanager
async def links() -> AsyncIterator[tuple[Link, Link]]:
    async with fabrics_and_links() as (_, _, one, other):
        yield one, other


@pytest.mark.parametrize("check", LINK_CHECKS, ids=lambda check: check.__name__)
async def test_links_conform(check: Check) -> None:
    await run_check(check, links)


async def send_until_cancelled(link: Link, payload: np.ndarray[Any, Any]) -> None:
    while True:
        await link.send(b"", (payload,))


async def test_a_slow_reader_slows_its_sender_and_not_the_control_plane() -> None:
    with trio.fail_after(30):
        async with fabrics_and_links() as (a, b, one, other), trio.open_nursery() as nursery:
            nursery.start_soon(send_until_cancelled, one, np.zeros(2**20))
            await wait_all_tasks_blocked(0.05)
            unread = sum(map(len, b._connections[a.peer_id][0].muxed_conn.stream_buffers.values()))
            assert limits.LINK_STREAM_WINDOW_BYTES // 2 < unread <= limits.LINK_STREAM_WINDOW_BYTES
            # Whatever waits there, the connection works on.
            stream = await a.open_stream(b.peer_id, "/echo")
            await stream.write(b"ping")
            assert await stream.read(4) == b"ping"
            await stream.aclose()
            _, nbytes = await other.receive_header()
            await other.receive_into((bytearray(nbytes),))
            nursery.cancel_scope.cancel()


async def test_data_and_control_messages_share_the_connection() -> None:
    async def drain(link: Link) -> None:
        while True:
            await link.receive_header()
            await link.discard_payload()

    with trio.fail_after(30):
        async with fabrics_and_links() as (a, b, one, other), trio.open_nursery() as nursery:
            for link in (one, other):
                nursery.start_soon(send_until_cancelled, link, np.zeros(2**20))
                nursery.start_soon(drain, link)
            stream = await a.open_stream(b.peer_id, "/echo")
            for _ in range(20):
                before = one.stats.bytes_received + other.stats.bytes_received
                await stream.write(b"ping")
                assert await stream.read(4) == b"ping"
                # Not behind all the data that there is, but behind a window of it or two.
                passed = one.stats.bytes_received + other.stats.bytes_received - before
                assert passed < 16 * limits.LINK_STREAM_WINDOW_BYTES
            await stream.aclose()
            nursery.cancel_scope.cancel()


async def test_a_lost_connection_ends_the_link() -> None:
    with trio.fail_after(30):
        async with fabrics_and_links() as (a, b, one, other), trio.open_nursery() as nursery:

            async def receive(link: Link) -> None:
                with pytest.raises(LinkClosedError, match=r"gone|without a goodbye"):
                    await link.receive_header()

            nursery.start_soon(receive, one)
            nursery.start_soon(receive, other)
            await wait_all_tasks_blocked()
            await a.disconnect(b.peer_id)
        assert one.closed
        assert other.closed
