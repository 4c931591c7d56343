"""Asking routers for a port: ones that refuse, that do not answer, that answer nonsense. (A real one: tests/reach.)"""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.discovery import port_mapping
from sparkle_mesh.discovery.port_mapping import Mapping, PortMapper, default_gateway, map_by_nat_pmp, map_by_upnp
from sparkle_mesh.errors import UnreachableError


@asynccontextmanager
async def router(
    answer: Callable[[bytes], bytes | None], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[bytes]]:
    """A router at 127.0.0.1 that says what ``answer`` returns; yields what it was asked."""
    asked: list[bytes] = []
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        monkeypatch.setattr(limits, "NAT_PMP_PORT", sock.getsockname()[1])

        async def serve() -> None:
            while True:
                data, sender = await sock.recvfrom(100)
                asked.append(data)
                reply = answer(data)
                if reply is not None:
                    await sock.sendto(reply, sender)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield asked
            nursery.cancel_scope.cancel()


def proper(data: bytes, *, result: int = 0, host: str = "44.0.0.7") -> bytes:
    if data[1] == 0:
        return struct.pack("!BBHI4s", 0, 128, result, 1, socket.inet_aton(host))
    _, _, _, inside, outside, lifetime = struct.unpack("!BBHHHI", data)
    return struct.pack("!BBHIHHI", 0, 130, result, 1, inside, outside + 1, lifetime // 2)


async def test_what_the_router_says_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    async with router(proper, monkeypatch) as asked:
        mapping = await map_by_nat_pmp("127.0.0.1", 45654, lifetime_s=100)
        assert mapping == Mapping("44.0.0.7", 45655, 50.0, "NAT-PMP")
        assert mapping.address == "/ip4/44.0.0.7/tcp/45655"
        assert [len(data) for data in asked] == [2, 12]


async def test_a_lost_question_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = iter([None, b"nonsense", None])
    async with router(lambda data: next(lost, proper(data)), monkeypatch) as asked:
        assert (await map_by_nat_pmp("127.0.0.1", 1)).port == 2
        assert len(asked) == 5


async def test_one_that_refuses_and_one_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NAT_PMP_WAIT_S", 0.01)
    async with router(lambda data: proper(data, result=2), monkeypatch):
        with pytest.raises(UnreachableError, match="refuses to map a port: NAT-PMP result 2"):
            await map_by_nat_pmp("127.0.0.1", 1)
    async with router(lambda data: None, monkeypatch):
        with pytest.raises(UnreachableError, match="does not answer to NAT-PMP"):
            await map_by_nat_pmp("127.0.0.1", 1)
    with pytest.raises(UnreachableError, match="does not speak NAT-PMP"):
        await map_by_nat_pmp("127.0.0.1", 1)


def test_the_router_is_where_packets_to_anywhere_go(tmp_path: Path) -> None:
    routes = tmp_path / "route"
    routes.write_text(
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n"
        "eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\n"
        "eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\n"
    )
    assert default_gateway(routes) == "192.168.1.1"
    routes.write_text("Iface\n")
    assert default_gateway(routes) is None
    assert default_gateway(tmp_path / "none") is None


def test_no_upnp_router(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        discoverdelay = 0

        def discover(self) -> int:
            return 0

        def selectigd(self) -> None:
            raise Exception("No UPnP device discovered")

    monkeypatch.setattr("miniupnpc.UPnP", Client)
    with pytest.raises(UnreachableError, match="no router maps ports by UPnP: No UPnP device discovered"):
        map_by_upnp(1)


async def test_the_mapping_is_kept_and_its_end_is_told(monkeypatch: pytest.MonkeyPatch, autojump_clock) -> None:
    answers = iter(
        [
            Mapping("44.0.0.7", 1, 3600.0, "NAT-PMP"),
            Mapping("44.0.0.7", 1, 3600.0, "NAT-PMP"),
            None,
            Mapping("192.168.0.2", 1, 3600.0, "NAT-PMP"),
            Mapping("44.0.0.8", 1, 3600.0, "NAT-PMP"),
        ]
    )

    async def by_nat_pmp(gateway: str, port: int) -> Mapping:
        mapping = next(answers, None)
        if mapping is None:
            raise UnreachableError("it is off")
        return mapping

    async def by_upnp(port: int) -> Mapping:
        raise UnreachableError("there is none")

    monkeypatch.setattr(port_mapping, "default_gateway", lambda: "192.168.1.1")
    monkeypatch.setattr(port_mapping, "map_by_nat_pmp", by_nat_pmp)
    told: list[str | None] = []
    mapper = PortMapper(entropy=SYSTEM_ENTROPY, by_upnp=by_upnp)
    statuses = []
    with trio.move_on_after(4 * 3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mapper.run, lambda: 45654, told.append)
            while len(told) < 3:
                statuses.append(mapper.status())
                await trio.sleep(300)
            nursery.cancel_scope.cancel()
    assert told == ["/ip4/44.0.0.7/tcp/1", None, "/ip4/44.0.0.8/tcp/1"]
    assert "it is off; there is none" in statuses
    # What a router that is itself behind a NAT passes on leads nowhere.
    assert "the router itself is behind a NAT, at 192.168.0.2; there is none" in statuses
