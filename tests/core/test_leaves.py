"""The leaves: wire, clock, environment, broadcast, bare errors, the package's front door."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import sparkle_mesh
from sparkle_mesh import environment, wire
from sparkle_mesh.broadcast import Broadcast
from sparkle_mesh.clock import SYSTEM_CLOCK, SYSTEM_ENTROPY
from sparkle_mesh.errors import ProtocolError, UsageError
from sparkle_mesh.membership.messages import Greeting, MeshMessage, Ping
from sparkle_mesh.nurseries import bare_errors


def test_messages_round_trip_and_unknown_fields_are_ignored() -> None:
    assert wire.decode(wire.encode(Ping(probe=7)), MeshMessage) == Ping(probe=7)
    richer = msgspec.msgpack.encode({"type": "ping", "probe": 7, "colour": "blue"})
    assert wire.decode(richer, MeshMessage) == Ping(probe=7)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5000,
        wire.encode(Ping(probe=7))[:-1],
        msgspec.msgpack.encode({"type": "ping", "probe": -1}),
        msgspec.msgpack.encode({"type": "nonsense"}),
        msgspec.msgpack.encode({"type": "ping", "probe": "many"}),
    ],
)
def test_bytes_that_are_no_message_are_protocol_errors(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a valid"):
        wire.decode(data, MeshMessage)


def test_messages_over_the_limit_are_refused_before_parsing() -> None:
    with pytest.raises(ProtocolError, match="over the limit of 10"):
        wire.decode(b"x" * 11, MeshMessage, max_bytes=10)


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_raise_a_protocol_error(data: bytes) -> None:
    for message_type in (MeshMessage, Greeting):
        try:
            wire.decode(data, message_type)
        except ProtocolError:
            continue


def test_clock_and_entropy_are_the_systems() -> None:
    first = SYSTEM_CLOCK.now()
    assert SYSTEM_CLOCK.now() >= first
    assert SYSTEM_CLOCK.wall_time() > 1.7e9
    assert len(SYSTEM_ENTROPY.token(9)) == 9
    assert 2 <= SYSTEM_ENTROPY.uniform(2, 3) < 3


def test_data_dir_is_chosen_by_argument_then_variable_then_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARKLE_DATA_DIR", str(tmp_path / "variable"))
    assert environment.resolve_data_dir(tmp_path / "argument") == tmp_path / "argument"
    chosen = environment.resolve_data_dir()
    assert chosen == tmp_path / "variable"
    assert chosen.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("SPARKLE_DATA_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert "sparkle-mesh" in str(environment.resolve_data_dir())


def test_a_data_dir_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be used"):
        environment.resolve_data_dir(tmp_path / "file")
    for nonsense in (5, "a\0b", "~nobody-of-this-name/x"):
        with pytest.raises(UsageError, match="no path"):
            environment.resolve_data_dir(nonsense)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="data_dir is empty"):
        environment.resolve_data_dir("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UsageError, match="run `chmod o-w"):
        environment.resolve_data_dir(tmp_path / "open")
    monkeypatch.setattr(os, "getuid", lambda: 123456)
    with pytest.raises(UsageError, match="belongs to user id"):
        environment.resolve_data_dir(tmp_path)


def test_the_host_has_one_id(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.host_id() == environment.host_id()
    assert len(environment.host_id()) == 16

    def unreadable(self: Path) -> bytes:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    assert len(environment.host_id()) == 16


async def test_broadcast_reaches_all_and_cuts_off_the_slow() -> None:
    broadcast: Broadcast[int] = Broadcast(2)
    with broadcast.subscribe() as quick, broadcast.subscribe() as slow:
        for number in range(4):
            broadcast.send(number)
            assert await quick.receive() == number
        assert [item async for item in slow] == [0, 1]
        broadcast.close()
        with pytest.raises(trio.EndOfChannel):
            await quick.receive()
    broadcast.send(9)


async def test_one_error_comes_bare_several_stay_a_group() -> None:
    async def fail_once() -> None:
        with bare_errors():
            async with trio.open_nursery() as outer, trio.open_nursery():
                outer.start_soon(trio.sleep_forever)
                raise UsageError("the only one")

    with pytest.raises(UsageError, match="only"):
        await fail_once()

    async def fail() -> None:
        raise UsageError("one of two")

    async def fail_twice() -> None:
        with bare_errors():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                nursery.start_soon(fail)

    with pytest.raises(BaseExceptionGroup):
        await fail_twice()


def test_the_front_door_says_what_is_behind_it() -> None:
    assert set(sparkle_mesh.__all__) <= set(dir(sparkle_mesh))
    assert sparkle_mesh.errors.SparkleError is not None
    assert sparkle_mesh.__version__
    with pytest.raises(AttributeError, match="no attribute 'jion'"):
        _ = sparkle_mesh.jion  # type: ignore[attr-defined]
