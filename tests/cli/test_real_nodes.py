"""``sparkle-node`` as real processes that meet over loopback."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparkle_mesh import limits
from sparkle_mesh.membership.keys import MeshKey

Start = Callable[..., Any]
Ask = Callable[..., tuple[int, str, str]]

HERE = ("--listen", "/ip4/127.0.0.1/tcp/0", "--no-lan", "--log-format", "json")


def left_in(data_dir: Path) -> set[str]:
    """Return the files that a node left, but for those it is to keep."""
    kept = {"identity.key", "peers", "revocations"}
    return {str(path.relative_to(data_dir)) for path in data_dir.rglob("*") if not path.is_dir()} - {
        str(path.relative_to(data_dir)) for name in kept for path in [data_dir / name, *(data_dir / name).rglob("*")]
    }


def end(node: Any, number: signal.Signals = signal.SIGTERM) -> None:
    node.signal(number)
    code, out, _ = node.end()
    assert code == 0
    assert [json.loads(line)["event"] for line in out[-2:]] == ["stopping", "stopped"]


def test_nodes_meet_by_invite_and_part(start: Start, ask_node: Ask, tmp_path: Path) -> None:
    key_file = tmp_path / "mesh.key"
    MeshKey.generate().save(key_file)
    first_dir, second_dir = tmp_path / "first", tmp_path / "second"
    first = start(first_dir, "--mesh", "ours", "--key-file", str(key_file), *HERE, real=True)
    first_id = first.wait_for_event("started")["peer_id"]
    code, invite, _ = ask_node("invite", data_dir=first_dir)
    assert code == 0
    second = start(second_dir, "--join", invite.strip(), *HERE, real=True)
    second_id = second.wait_for_event("started")["peer_id"]
    assert first.wait_for_event("peer_joined")["peer"]["peer_id"] == second_id
    assert second.wait_for_event("peer_joined")["peer"]["peer_id"] == first_id

    peers = json.loads(ask_node("peers", "--json", data_dir=first_dir)[1])
    assert [(peer["peer_id"], peer["role"], peer["admitted"]) for peer in peers] == [(second_id, "node", True)]
    status = json.loads(ask_node("status", "--json", data_dir=second_dir)[1])
    assert (status["mesh"], status["keyed"], status["peer_count"]) == ("ours", True, 1)
    assert status["devices"][0]["kind"] == "cpu"
    assert ask_node("id", data_dir=second_dir)[1].strip() == second_id

    end(second, signal.SIGINT)
    left = first.wait_for_event("peer_left")
    assert (left["peer_id"], left["reason"]) == (second_id, "it left the mesh")
    end(first)
    assert left_in(first_dir) == left_in(second_dir) == set()
    assert ask_node("id", data_dir=second_dir)[1].strip() == second_id


def test_nodes_meet_in_the_other_order_of_start(start: Start, ask_node: Ask, tmp_path: Path) -> None:
    first_dir, second_dir = tmp_path / "first", tmp_path / "second"
    first_id = ask_node("id", data_dir=first_dir)[1].strip()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # held, and not listened on: dials are refused until the node has it
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address = f"/ip4/127.0.0.1/tcp/{holder.getsockname()[1]}"
        second = start(second_dir, "--join", f"{address}/p2p/{first_id}", *HERE, real=True)
        second.wait_for_event("started")
    first = start(first_dir, "--no-lan", "--log-format", "json", "--listen", address, real=True)
    assert first.wait_for_event("started")["peer_id"] == first_id
    assert second.wait_for_event("peer_joined")["peer"]["peer_id"] == first_id
    end(second)
    end(first)


def test_the_wrong_key_is_told_and_is_no_peer(start: Start, ask_node: Ask, tmp_path: Path) -> None:
    nodes, directories = [], [tmp_path / "first", tmp_path / "second"]
    join: tuple[str, ...] = ()
    for number, directory in enumerate(directories):
        key_file = tmp_path / f"{number}.key"
        MeshKey.generate().save(key_file)
        nodes.append(start(directory, "--mesh", "ours", "--key-file", str(key_file), *HERE, *join, real=True))
        started = nodes[-1].wait_for_event("started")
        join = ("--join", f"{started['addresses'][0]}/p2p/{started['peer_id']}")
    for node in nodes:
        assert "key" in node.wait_for_event("peer_refused")["reason"]
    for node, directory in zip(nodes, directories, strict=True):
        assert ask_node("peers", "--json", data_dir=directory) == (0, "[]\n", "")
        end(node)


def test_a_node_lets_only_those_in_that_it_was_told_to(start: Start, ask_node: Ask, tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("guarded", "listed", "stranger")]
    ids = [ask_node("id", data_dir=directory)[1].strip() for directory in directories]
    guarded = start(directories[0], *HERE, "--allow", ids[1], real=True)
    started = guarded.wait_for_event("started")
    assert started["allowed_count"] == 1
    join = ("--join", f"{started['addresses'][0]}/p2p/{ids[0]}")
    listed, stranger = [start(directory, *HERE, *join, real=True) for directory in directories[1:]]
    assert guarded.wait_for_event("peer_refused")["peer_id"] == ids[2]
    refused = stranger.wait_for_event("peer_refused")
    assert refused["peer_id"] == ids[0]
    assert f"{ids[2]} is not on the list of peers that are allowed here" in refused["reason"]
    listed.wait_for(ids[0])
    peers = json.loads(ask_node("peers", "--json", data_dir=directories[1])[1])
    assert ids[0] in {peer["peer_id"] for peer in peers}
    for node in (guarded, listed, stranger):
        end(node)


def test_the_founder_throws_a_machine_out(start: Start, ask_node: Ask, tmp_path: Path) -> None:
    key_file = tmp_path / "mesh.key"
    MeshKey.generate().save(key_file)
    first_dir, second_dir = tmp_path / "first", tmp_path / "second"
    first_id, second_id = (ask_node("id", data_dir=path)[1].strip() for path in (first_dir, second_dir))
    options = ("--mesh", "ours", "--key-file", str(key_file), "--founder", first_id)
    first = start(first_dir, *options, *HERE, real=True)
    assert first.wait_for_event("started")["founder"] == first_id
    invite = ask_node("invite", data_dir=first_dir)[1].strip()
    second = start(second_dir, "--join", invite, *HERE, real=True)
    assert second.wait_for_event("started")["founder"] == first_id
    first.wait_for_event("peer_joined")
    code, _, err = ask_node("revoke", first_id, data_dir=second_dir)
    assert code == 1
    assert "only the founder" in err
    code, out, _ = ask_node("revoke", second_id, "--json", data_dir=first_dir)
    assert (code, json.loads(out)) == (0, {"sequence": 1, "revoked": [second_id]})
    assert first.wait_for_event("peer_left")["reason"] == f"{second_id} was revoked by the mesh's founder"
    assert "was revoked by the mesh's founder" in second.wait_for_event("peer_refused")["reason"]
    assert json.loads(ask_node("peers", "--json", data_dir=first_dir)[1]) == []
    end(second)
    end(first)
    (kept,) = (first_dir / "revocations").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600


def test_the_second_on_a_data_directory_and_the_next_after_a_kill(start: Start, ask_node: Ask, data_dir: Path) -> None:
    first = start(data_dir, *HERE, real=True)
    peer_id = first.wait_for_event("started")["peer_id"]
    code, out, err = start(data_dir, *HERE, real=True).end()
    assert (code, out, len(err)) == (1, [], 1)
    assert f"pid {first.process.pid}" in json.loads(err[0])["message"]
    first.signal(signal.SIGKILL)
    first.end()
    assert ask_node("status")[0] == 1
    again = start(data_dir, *HERE, real=True)
    assert again.wait_for_event("started")["peer_id"] == peer_id
    end(again)
    assert left_in(data_dir) == set()


def test_a_port_in_use_is_one_line_and_exit_code_1(start: Start, data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = start(data_dir, "--no-lan", "--listen", f"/ip4/127.0.0.1/tcp/{port}", real=True).end()
    assert (code, out, len(err)) == (1, [], 1)
    assert str(port) in err[0]


def test_the_usual_port_in_use_is_told_and_another_is_taken(start: Start, data_dir: Path) -> None:
    with socket.socket() as holder:
        try:
            holder.bind(("0.0.0.0", limits.DEFAULT_PORT))
            holder.listen(1)
        except OSError:
            # Somebody on this machine has it: just what is needed.
            holder.close()
        node = start(data_dir, "--no-lan", "--log-format", "json", "--mesh", "port-test", real=True)
        assert node.wait_for_event("port_taken")["wanted"] == [f"/ip4/0.0.0.0/tcp/{limits.DEFAULT_PORT}"]
        addresses = node.wait_for_event("started")["addresses"]
        end(node)
    assert addresses
    assert not any(address.endswith(f"/{limits.DEFAULT_PORT}") for address in addresses)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_at_any_moment_of_the_start_ends_it_cleanly(
    start: Start, data_dir: Path, number: signal.Signals
) -> None:
    node = start(data_dir, *HERE, "--log-level", "debug", real=True)
    # The lock is the first thing a node takes; what follows (libp2p, sockets) takes a second.
    while not (data_dir / "node.lock").exists():
        assert node.process.poll() is None
    node.signal(number)
    code, out, _ = node.end()
    assert code == 0
    assert json.loads(out[-1])["event"] == "stopped"
    assert left_in(data_dir) == set()
