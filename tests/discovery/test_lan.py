"""Beacons over real multicast on this machine's interfaces, each test on a port of its own."""

from __future__ import annotations

import errno
import logging
import os

import pytest
import trio

from sparkle_mesh import limits
from sparkle_mesh.discovery.beacon import VERSION, Beacon, encode_beacon
from sparkle_mesh.discovery.lan import LanBeacons, interface_ips

ADDRESS = "/ip4/127.0.0.1/tcp/7"
LOOPBACK_ONLY = ("127.0.0.1",)


class Heard:
    """Hints, and waiting for one."""

    def __init__(self):
        self.hints = []
        self._send, self._receive = trio.open_memory_channel(1000)

    def __call__(self, hint):
        self.hints.append(hint)
        self._send.send_nowait(hint)

    async def next_of(self, *peer_ids):
        """Wait until all of ``peer_ids`` were heard; return the last hint."""
        missing = set(peer_ids)
        with trio.fail_after(10):
            while missing:
                hint = await self._receive.receive()
                missing.discard(hint.peer_id)
            return hint


@pytest.fixture
def make(tag, entropy, group_port):
    def make(peer_id, *, mesh_tag=tag, addresses=(ADDRESS,), interfaces=lambda: LOOPBACK_ONLY, **more):
        heard = Heard()
        beacons = LanBeacons(
            peer_id,
            mesh_tag,
            addresses=lambda: addresses,
            heard=heard,
            entropy=entropy,
            port=group_port,
            interfaces=interfaces,
            **more,
        )
        return beacons, heard

    return make


async def test_everybody_knows_everybody_soon(make):
    everybody = {f"P{number}": make(f"P{number}") for number in range(5)}
    async with trio.open_nursery() as nursery:
        for peer_id in ("P0", "P1", "P2"):
            await nursery.start(everybody[peer_id][0].run)
        for peer_id in ("P3", "P4"):
            await nursery.start(everybody[peer_id][0].run)
        for peer_id, (_, heard) in everybody.items():
            await heard.next_of(*(everybody.keys() - {peer_id}))
        nursery.cancel_scope.cancel()
    for peer_id, (beacons, heard) in everybody.items():
        assert peer_id not in {hint.peer_id for hint in heard.hints}
        assert all(hint.same_host and hint.addresses == (ADDRESS,) for hint in heard.hints)
        assert beacons.status().startswith("multicast on 1 interfaces")


async def test_a_newcomer_is_answered_by_one_that_has_long_told(make):
    old, heard_by_old = make("old")
    new, heard_by_new = make("new")
    async with trio.open_nursery() as nursery:
        await nursery.start(old.run)
        # Its own questions are over: what it sends now is an answer.
        old._machine._questions_at.clear()
        old._machine._regular_at = trio.current_time() + 1000
        await nursery.start(new.run)
        assert (await heard_by_new.next_of("old")).fresh is False
        assert (await heard_by_old.next_of("new")).fresh is True
        nursery.cancel_scope.cancel()


async def test_other_meshes_and_garbage_are_not_heard(make, shout, tag):
    mine, heard = make("mine")
    other, heard_by_other = make("other", mesh_tag=b"u" * 32)
    good = Beacon(version=VERSION, mesh_tag=tag, peer_id="good", addresses=(ADDRESS,), port=7)
    async with trio.open_nursery() as nursery:
        await nursery.start(mine.run)
        await nursery.start(other.run)
        for garbage in (b"", b"x", b"spkl\xff", encode_beacon(good)[:-1], os.urandom(3000)):
            shout(garbage)
        shout(encode_beacon(good))
        await heard.next_of("good")
        nursery.cancel_scope.cancel()
    assert {hint.peer_id for hint in heard.hints} == {"good"}
    assert heard_by_other.hints == []
    assert mine._machine.ignored_count >= 5


async def test_a_flood_is_dropped_and_told(make, shout):
    mine, _ = make("mine")
    async with trio.open_nursery() as nursery:
        await nursery.start(mine.run)
        with trio.fail_after(20):
            while mine._machine.dropped_count == 0:
                shout(b"flood")
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert "dropped (too many at once)" in mine.status()


async def test_nothing_of_loopback_is_told_elsewhere(make):
    elsewhere = [ip for ip in interface_ips() if not ip.startswith("127.")]
    beacons, _ = make("mine", interfaces=lambda: [*LOOPBACK_ONLY, *elsewhere])
    async with trio.open_nursery() as nursery:
        await nursery.start(beacons.run)
        before = beacons.sent_count
        await beacons._send(beacons._sockets[1], wants_answer=False)
        assert beacons.sent_count == before + 1
        nursery.cancel_scope.cancel()


def test_interfaces_of_this_machine_loopback_first():
    ips = interface_ips()
    assert ips[0].startswith("127.")
    assert len(ips) <= limits.BEACON_INTERFACES_MAX_COUNT


async def test_interfaces_that_come_and_go_are_followed(make, caplog):
    ips = ["127.0.0.1"]
    beacons, _ = make("mine", interfaces=lambda: ips)
    caplog.set_level(logging.INFO)
    async with trio.open_nursery() as nursery:
        await nursery.start(beacons.run)
        receiver = beacons._sockets[0]
        # No interface of this machine has an address that is set aside for documentation.
        ips.append("203.0.113.9")
        beacons._follow_interfaces(receiver)
        beacons._follow_interfaces(receiver)
        assert beacons._joined == {"127.0.0.1"}
        assert "203.0.113.9: " in beacons.status()
        ips[:] = ["127.0.0.1"]
        beacons._follow_interfaces(receiver)
        assert "203.0.113.9" not in beacons.status()
        ips.clear()
        beacons._follow_interfaces(receiver)
        assert beacons._joined == set()
        ips.append("127.0.0.1")
        beacons._follow_interfaces(receiver)
        assert beacons._joined == {"127.0.0.1"}
        nursery.cancel_scope.cancel()
    assert [record.getMessage().startswith("multicast on 203.0.113.9") for record in caplog.records] == [True]


async def test_interfaces_that_cannot_be_listed_stay_as_they_were(make):
    beacons, _ = make("mine")

    def forbidden():
        raise PermissionError(errno.EACCES, "Permission denied")

    async with trio.open_nursery() as nursery:
        await nursery.start(beacons.run)
        beacons._interfaces = forbidden
        beacons._follow_interfaces(beacons._sockets[0])
        assert beacons._joined == {"127.0.0.1"}
        assert "interfaces: Permission denied" in beacons.status()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("interfaces", [tuple, lambda: ("203.0.113.9",)])
async def test_without_an_interface_one_line_says_so_and_the_rest_goes_on(make, caplog, interfaces):
    beacons, _ = make("mine", interfaces=interfaces)
    async with trio.open_nursery() as nursery:
        await nursery.start(beacons.run)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "cannot be found by multicast" in record.getMessage()
    assert "join" in record.getMessage()
    assert beacons.status().startswith("not possible")
    assert beacons._sockets == []


async def test_where_the_group_cannot_be_used_one_line_says_so(make, caplog):
    beacons, _ = make("mine", group="203.0.113.9")
    async with trio.open_nursery() as nursery:
        await nursery.start(beacons.run)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert beacons.status().startswith("not possible (")
    assert beacons._sockets == []


async def test_a_socket_that_fails_later_ends_only_the_beacons(make, caplog):
    beacons, _ = make("mine")
    async with trio.open_nursery() as nursery:
        await nursery.start(beacons.run)
        real = beacons._sockets[0]

        class Failing:
            def __getattr__(self, name):
                return getattr(real, name)

            async def recvfrom(self, max_bytes):
                await trio.lowlevel.checkpoint()
                raise OSError(errno.ENETDOWN, "Network is down")

        async with trio.open_nursery() as inner:
            await inner.start(run_with_receiver, beacons, Failing())
        nursery.cancel_scope.cancel()
    assert "Network is down" in caplog.text
    assert beacons.status() == "not possible (Network is down)"


async def run_with_receiver(beacons, receiver, *, task_status):
    task_status.started()
    await beacons._receive_all(receiver, beacons._machine)


async def test_an_interface_that_refuses_to_send_is_told_once(make, caplog):
    caplog.set_level(logging.INFO)
    beacons, _ = make("mine", addresses=("/ip4/10.0.0.4/tcp/7",))
    async with trio.open_nursery() as nursery:
        await nursery.start(beacons.run)
        beacons._joined.add("203.0.113.9")
        sender = beacons._sockets[1]
        await beacons._send(sender, wants_answer=False)
        await beacons._send(sender, wants_answer=False)
        assert "203.0.113.9: " in beacons.status()
        beacons._joined.discard("203.0.113.9")
        nursery.cancel_scope.cancel()
    assert caplog.text.count("multicast on 203.0.113.9") == 1


async def test_status_before_the_start(make):
    beacons, _ = make("mine")
    assert beacons.status() == "not started"
    await trio.lowlevel.checkpoint()


async def test_sockets_are_closed_in_a_forked_child_and_live_on_in_the_parent(make):
    beacons, heard = make("mine")
    other, _ = make("other")
    async with trio.open_nursery() as nursery:
        await nursery.start(beacons.run)
        descriptors = [sock.fileno() for sock in beacons._sockets]
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no branch
            beacons.close_in_child()
            beacons.close_in_child()
            still_open = b"".join(b"open" for fd in descriptors if is_open(fd))
            os.write(writer, still_open or b"closed")
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert await trio.to_thread.run_sync(pipe.read) == b"closed"
        assert (await trio.to_thread.run_sync(os.waitpid, child, 0))[1] == 0
        assert all(is_open(fd) for fd in descriptors)
        await nursery.start(other.run)
        await heard.next_of("other")
        nursery.cancel_scope.cancel()


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
