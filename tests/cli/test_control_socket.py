"""The control socket: whom it answers, what it survives, what the asking side says when it is not answered."""

from __future__ import annotations

import os
import random
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from sparkle_mesh import limits, wire
from sparkle_mesh.capabilities.search import DeviceQuery
from sparkle_mesh.cli import control, control_server
from sparkle_mesh.cli.control import ControlReply, ControlRequest, ask, make_run_dir, run_dir
from sparkle_mesh.cli.control_server import serve_control
from sparkle_mesh.cli.lock import LOCK_NAME
from sparkle_mesh.errors import DeadlineError, NodeBusyError, NoNodeError, ProtocolError, UsageError


@asynccontextmanager
async def serving(handler: Any, data_dir: Path, **options: Any) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_control, handler, data_dir, **options))
        yield
        nursery.cancel_scope.cancel()


async def ask_in_thread(data_dir: Path, command: Any, timeout_s: float = 30, **more: Any) -> ControlReply:
    return await trio.to_thread.run_sync(partial(ask, data_dir, command, timeout_s=timeout_s, **more))


async def connect(data_dir: Path) -> trio.SocketStream:
    return await trio.open_unix_socket(run_dir(data_dir) / control.SOCKET_NAME)


def framed(message: wire.Message) -> bytes:
    data = wire.encode(message)
    return len(data).to_bytes(4, "big") + data


async def answer_to(data_dir: Path, data: bytes) -> bytes:
    """Send ``data`` and return all that comes back."""
    async with await connect(data_dir) as stream:
        await stream.send_all(data)
        await stream.send_eof()
        return await receive_all(stream)


async def receive_all(stream: trio.SocketStream) -> bytes:
    """Return what comes until the end, or until the reset that closing before reading everything makes."""
    received = b""
    with suppress(trio.BrokenResourceError):
        async for piece in stream:
            received += piece
    return received


def decode_reply(data: bytes) -> ControlReply:
    assert len(data) == 4 + int.from_bytes(data[:4], "big")
    return wire.decode(data[4:], ControlReply)


# --- The node's side -----------------------------------------------------------------------------


async def test_commands_are_answered(fake: ModuleType, data_dir: Path) -> None:
    async with serving(fake.FakeNode(), data_dir):
        assert (await ask_in_thread(data_dir, "status")).status == fake.status()
        assert (await ask_in_thread(data_dir, "peers")).peers == (fake.peer(),)
        assert (await ask_in_thread(data_dir, "invite")).invite == "sparkle-invite-1:fake"
        assert (await ask_in_thread(data_dir, "devices")).devices == (fake.found(),)
        query = DeviceQuery.of("opencl")
        assert (await ask_in_thread(data_dir, "devices", devices=query)).devices == ()
        # What did not come from this command is checked all the same.
        with pytest.raises(NodeBusyError, match="limit 0 must be"):
            await ask_in_thread(data_dir, "devices", devices=msgspec.structs.replace(query, limit=0))


async def test_only_the_owner_can_open_it_and_nothing_is_left(fake: ModuleType, data_dir: Path) -> None:
    directory = run_dir(data_dir)
    directory.mkdir(mode=0o755)
    async with serving(fake.FakeNode(), data_dir):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / control.SOCKET_NAME).stat().st_mode) == 0o600
    assert list(directory.iterdir()) == []


async def test_a_process_of_another_user_is_refused(fake: ModuleType, data_dir: Path) -> None:
    async with serving(fake.FakeNode(), data_dir, owner_uid=os.geteuid() + 1):
        with pytest.raises(NodeBusyError, match="belongs to another user"):
            await ask_in_thread(data_dir, "status")


async def test_a_dead_nodes_socket_is_replaced(fake: ModuleType, data_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(make_run_dir(data_dir) / control.SOCKET_NAME))
    async with serving(fake.FakeNode(), data_dir):
        assert (await ask_in_thread(data_dir, "status")).status is not None


async def test_a_file_in_the_way_is_left_alone(fake: ModuleType, data_dir: Path) -> None:
    precious = make_run_dir(data_dir) / control.SOCKET_NAME
    precious.write_text("precious")
    with pytest.raises(UsageError, match="in the way"):
        await serve_control(fake.FakeNode(), data_dir)
    assert precious.read_text() == "precious"


async def test_a_directory_that_cannot_hold_sockets_is_named(
    fake: ModuleType, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "SOCKET_NAME", "x" * 300)
    with pytest.raises(UsageError, match="cannot be made: File name too long"):
        await serve_control(fake.FakeNode(), data_dir)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_run_directory_that_is_not_ours_is_refused(data_dir: Path, tmp_path: Path, kind: str) -> None:
    if kind == "file":
        run_dir(data_dir).write_text("")
    else:
        run_dir(data_dir).symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"not a directory of this user's own|File exists"):
        make_run_dir(data_dir)


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory"):
        make_run_dir(tmp_path / "absent")


async def test_a_path_too_long_for_a_socket_works(fake: ModuleType, tmp_path: Path) -> None:
    data_dir = tmp_path / ("long" * 30) / ("er" * 30)
    data_dir.mkdir(parents=True)
    with pytest.raises(NoNodeError):
        ask(data_dir, "status")
    async with serving(fake.FakeNode(), data_dir):
        assert (await ask_in_thread(data_dir, "invite")).invite == "sparkle-invite-1:fake"
        assert stat.S_IMODE((run_dir(data_dir) / control.SOCKET_NAME).stat().st_mode) == 0o600


GARBAGE = {
    "nothing": b"",
    "half a length": b"\0\0",
    "huge length": b"\xff\xff\xff\xff" + b"x" * 100,
    "cut short": b"\0\0\0\x20abc",
    "not msgpack": b"\0\0\0\x04\xc1\xc1\xc1\xc1",
    "wrong shape": b"\0\0\0\x01\x90",
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
async def test_garbage_is_answered_with_an_error_and_harms_nobody(
    fake: ModuleType, data_dir: Path, garbage: bytes
) -> None:
    async with serving(fake.FakeNode(), data_dir):
        assert decode_reply(await answer_to(data_dir, garbage)).error
        assert (await ask_in_thread(data_dir, "status")).status is not None


async def test_mutated_requests_never_end_the_server(fake: ModuleType, data_dir: Path) -> None:
    rng = random.Random(7)
    valid = framed(ControlRequest(version=control.VERSION, command="status"))
    async with serving(fake.FakeNode(), data_dir):
        for _ in range(200):
            data = bytearray(valid)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            reply = decode_reply(await answer_to(data_dir, bytes(data)))
            assert (reply.error is None) != (reply.status is None)


async def test_a_request_may_come_byte_by_byte(fake: ModuleType, data_dir: Path) -> None:
    async with serving(fake.FakeNode(), data_dir), await connect(data_dir) as stream:
        for byte in framed(ControlRequest(version=control.VERSION, command="invite")):
            await stream.send_all(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked()
        assert decode_reply(await receive_all(stream)).invite == "sparkle-invite-1:fake"


async def test_other_versions_and_unknown_commands_are_told_so(fake: ModuleType, data_dir: Path) -> None:
    async with serving(fake.FakeNode(), data_dir):
        reply = decode_reply(await answer_to(data_dir, framed(ControlRequest(version=99, command="status"))))
        assert reply.error is not None
        assert "version 1" in reply.error
        assert "99" in reply.error
        reply = decode_reply(
            await answer_to(data_dir, framed(ControlRequest(version=control.VERSION, command="dance")))
        )
        assert reply.error == "it does not know the command 'dance'"


async def test_a_silent_client_is_given_up(fake: ModuleType, data_dir: Path, autojump_clock: MockClock) -> None:
    async with serving(fake.FakeNode(), data_dir), await connect(data_dir) as silent:
        begun = trio.current_time()
        assert await silent.receive_some() == b""
        assert trio.current_time() - begun == pytest.approx(limits.CONTROL_CLIENT_TIMEOUT_S)


async def test_a_client_that_does_not_read_is_given_up(
    fake: ModuleType, data_dir: Path, autojump_clock: MockClock
) -> None:
    node = fake.FakeNode()
    node.known_peers = [fake.peer(f"12D3KooW{n}", addresses=("/ip4/10.0.0.2/tcp/4",) * 50) for n in range(1000)]
    async with serving(node, data_dir), await connect(data_dir) as deaf:
        await deaf.send_all(framed(ControlRequest(version=control.VERSION, command="peers")))
        begun = trio.current_time()
        await trio.sleep(limits.CONTROL_CLIENT_TIMEOUT_S + 1)
        received = await receive_all(deaf)
        assert len(received) < 4 + int.from_bytes(received[:4], "big")
        assert trio.current_time() - begun < limits.CONTROL_CLIENT_TIMEOUT_S + 2


async def test_a_client_that_vanishes_harms_nobody(fake: ModuleType, data_dir: Path) -> None:
    node = fake.FakeNode()
    node.known_peers = [fake.peer(f"12D3KooW{n}", addresses=("/ip4/10.0.0.2/tcp/4",) * 50) for n in range(1000)]
    async with serving(node, data_dir):
        async with await connect(data_dir) as hasty:
            await hasty.send_all(framed(ControlRequest(version=control.VERSION, command="peers")))
            await hasty.receive_some(1)
        assert (await ask_in_thread(data_dir, "status")).status is not None


async def test_a_flood_of_clients_is_turned_away_and_passes(fake: ModuleType, data_dir: Path) -> None:
    async with serving(fake.FakeNode(), data_dir):
        idle = [await connect(data_dir) for _ in range(limits.CONTROL_CLIENTS_MAX_COUNT)]
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(NodeBusyError, match="try again"):
            await ask_in_thread(data_dir, "status")
        for stream in idle:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert (await ask_in_thread(data_dir, "status")).status is not None


async def test_what_the_node_cannot_do_is_told(fake: ModuleType, data_dir: Path) -> None:
    node = fake.FakeNode()
    node.failure = UsageError("no " * 1000)
    async with serving(node, data_dir):
        with pytest.raises(NodeBusyError, match="no no no"):
            await ask_in_thread(data_dir, "status")


async def test_an_answer_over_the_limit_is_told(
    fake: ModuleType, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONTROL_REPLY_MAX_BYTES", 128)
    async with serving(fake.FakeNode(), data_dir):
        with pytest.raises(NodeBusyError, match="too long to send"):
            await ask_in_thread(data_dir, "status")


# --- The asking side -----------------------------------------------------------------------------


@contextmanager
def listener_that(behave: Callable[[socket.socket], None], data_dir: Path) -> Iterator[None]:
    """Listen on the control socket of ``data_dir`` and treat one client as ``behave`` does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(make_run_dir(data_dir) / control.SOCKET_NAME))
        listener.listen(1)

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                behave(client)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(30)


def test_no_node_is_said_in_one_line(data_dir: Path) -> None:
    with pytest.raises(NoNodeError) as caught:
        ask(data_dir, "status")
    assert str(caught.value) == f"no node runs on {data_dir}; start one with `sparkle-node`"


async def test_a_node_that_is_just_starting_is_awaited(fake: ModuleType, data_dir: Path) -> None:
    (data_dir / LOCK_NAME).write_text(str(os.getpid()))
    replies: list[ControlReply] = []
    answered = trio.Event()

    async def ask_early() -> None:
        replies.append(await ask_in_thread(data_dir, "status"))
        answered.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_early)
        await trio.testing.wait_all_tasks_blocked()
        async with serving(fake.FakeNode(), data_dir):
            await answered.wait()
    assert replies[0].status is not None


async def test_a_node_that_is_not_there_yet_is_awaited_if_asked_to(fake: ModuleType, data_dir: Path) -> None:
    replies: list[ControlReply] = []
    answered = trio.Event()

    async def ask_early() -> None:
        replies.append(await trio.to_thread.run_sync(partial(ask, data_dir, "invite", wait_s=30)))
        answered.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_early)
        await trio.testing.wait_all_tasks_blocked()
        async with serving(fake.FakeNode(), data_dir):
            await answered.wait()
    assert replies[0].invite == "sparkle-invite-1:fake"


def test_waiting_for_a_node_ends(data_dir: Path) -> None:
    with pytest.raises(NoNodeError, match="no node runs on"):
        ask(data_dir, "status", wait_s=0.1)


def test_a_node_that_never_comes_up_is_named(data_dir: Path) -> None:
    (data_dir / LOCK_NAME).write_text(str(os.getpid()))
    with pytest.raises(NoNodeError, match=rf"process {os.getpid()} is starting, or stuck"):
        ask(data_dir, "status", timeout_s=0.01)


def test_a_node_that_does_not_answer_meets_the_deadline(data_dir: Path) -> None:
    done = threading.Event()
    with listener_that(lambda _client: (done.wait(30), None)[1], data_dir):
        with pytest.raises(DeadlineError, match=r"did not answer within 0\.05 s"):
            ask(data_dir, "status", timeout_s=0.05)
        done.set()


def test_a_node_that_trickles_meets_the_deadline(data_dir: Path) -> None:
    def trickle(client: socket.socket) -> None:
        try:
            client.sendall(b"\0\0\xff\xff")
            while True:
                client.sendall(b"x")
        except OSError:
            return

    with (
        listener_that(trickle, data_dir),
        pytest.raises((DeadlineError, ProtocolError)),
    ):
        ask(data_dir, "status", timeout_s=0.05)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (b"", NodeBusyError, "closed the connection"),
        (b"\0\0\0\x09abc", NodeBusyError, "closed the connection"),
        (b"\xff\xff\xff\xff", NodeBusyError, "another version"),
        (b"\0\0\0\x02\xc1\xc1", ProtocolError, "not a valid ControlReply"),
        (framed(ControlReply(version=1)), NodeBusyError, "holds no status"),
        (framed(ControlReply(version=1, error="busy")), NodeBusyError, "the node answers: busy"),
    ],
)
def test_bad_answers_are_told_apart(data_dir: Path, answer: bytes, error: type[Exception], message: str) -> None:
    def behave(client: socket.socket) -> None:
        client.recv(1000)
        client.sendall(answer)

    with listener_that(behave, data_dir), pytest.raises(error, match=message):
        ask(data_dir, "status", timeout_s=30)


def test_a_socket_that_cannot_be_opened_is_named(data_dir: Path) -> None:
    run_dir(data_dir).write_text("not a directory")
    with pytest.raises(NoNodeError, match="cannot be asked: Not a directory"):
        ask(data_dir, "status")
