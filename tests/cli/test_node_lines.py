"""What the command prints: for people, for programs, and against those who would write on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh.cli import render
from sparkle_mesh.membership.view import Member, View

HOSTILE = "\x1b[2J\nroot# \x9b\u202e"


def test_the_start_of_a_node(fake: ModuleType) -> None:
    line = render.started(fake.status(), Path("/data"))
    assert line.to_text("12:00:00").splitlines() == [
        "sparkle-node 0.1.0",
        "peer id    12D3KooWRawPbxPtP1eZaJpumGnyWX2DcUyd3RQnydr3eAto4Az7",
        "address    /ip4/0.0.0.0/tcp/45654/p2p/12D3KooWRawPbxPtP1eZaJpumGnyWX2DcUyd3RQnydr3eAto4Az7",
        "device     cpu 0: A CPU, 4 cores, 8 threads, 8.0 GiB",
        "mesh       a-mesh (no key: this host and its local networks only)",
        "data       /data",
    ]
    fields = json.loads(line.to_json(1.23456))
    assert (fields["event"], fields["time"], fields["peer_id"]) == (
        "started",
        1.235,
        "12D3KooWRawPbxPtP1eZaJpumGnyWX2DcUyd3RQnydr3eAto4Az7",
    )
    assert (fields["data_dir"], fields["devices"][0]["name"]) == ("/data", "A CPU")


def test_who_may_come_in_is_said(fake: ModuleType) -> None:
    assert "only who holds its key" in render.mesh_text(fake.status(keyed=True, public=True))
    assert "addresses are shown to anybody" in render.mesh_text(fake.status(public=True))
    assert "this host and its local networks only" in render.mesh_text(fake.status())
    listed = render.mesh_text(fake.status(keyed=True, allowed_count=3))
    assert listed == "a-mesh (only who holds its key; 3 allowed peers and what they certify, no others)"


def test_peers_come_and_go(fake: ModuleType) -> None:
    joined = render.peer_joined(fake.peer())
    assert joined.to_text("12:00:00") == "12:00:00 peer joined  12D3KooWPeer (trainer at /ip4/10.0.0.2/tcp/4)"
    assert json.loads(joined.to_json(0))["peer"]["rank"] == 1
    assert render.peer_joined(fake.peer(addresses=())).text == "peer joined  12D3KooWPeer (trainer)"
    of_machine = render.peer_joined(fake.peer(machine=fake.PEER_ID))
    assert of_machine.text == "peer joined  12D3KooWPeer (trainer of machine …eAto4Az7 at /ip4/10.0.0.2/tcp/4)"
    assert json.loads(of_machine.to_json(0))["peer"]["machine"] == fake.PEER_ID
    assert render.peer_joined(fake.peer(role="node", machine="12D3KooWPeer", addresses=())).text.endswith("(node)")
    assert render.peer_left("12D3", "it left").text == "peer left    12D3: it left"
    assert json.loads(render.peer_refused("12D3", "wrong key").to_json(0)) == {
        "time": 0,
        "event": "peer_refused",
        "peer_id": "12D3",
        "reason": "wrong key",
    }


def test_a_view_names_its_ranks() -> None:
    members = tuple(Member(peer_id=f"12D3KooWmember-{n}", incarnation=bytes(16)) for n in range(2))
    view = View(mesh_id=bytes(32), lineage=b"\xab" * 32, epoch=3, members=members)
    line = render.view_changed(view)
    assert line.text == "view         epoch 3, 2 members: 0=…member-0, 1=…member-1"
    assert json.loads(line.to_json(0))["view"] == {
        "epoch": 3,
        "lineage_hex": "ab" * 32,
        "size": 2,
        "members": ["12D3KooWmember-0", "12D3KooWmember-1"],
    }


def test_other_lines() -> None:
    assert "is in use" in render.port_taken(["/ip4/0.0.0.0/tcp/45654"]).text
    assert "Unix domain sockets" in render.no_control_socket().text
    assert render.stopping("SIGINT").fields == {"signal": "SIGINT"}
    assert render.stopped().text == "stopped"
    assert render.failed("a\nb").to_text("12:00:00") == "sparkle-node: a b"
    assert render.log_line("warning", "a.b", "text").to_text("12:00:00") == "12:00:00 warning: text"
    assert render.dropped_lines(3).fields == {"lines": 3}


def test_the_founder_is_shown(fake: ModuleType) -> None:
    other = render.status_text(fake.status(founder="12D3KooWFounder", revoked_count=2))
    assert "founder    12D3KooWFounder, has revoked 2 peers" in other.splitlines()
    own = render.started(fake.status(founder=fake.PEER_ID), Path("/data")).text
    assert "founder    this machine, has revoked 0 peers" in own.splitlines()


def test_status_for_people(fake: ModuleType) -> None:
    assert render.status_text(fake.status(pid=7)).splitlines()[4:] == [
        "peers      1",
        "view       epoch 0, lineage abababababab, 2 members",
        "           0  12D3KooWRawPbxPtP1eZaJpumGnyWX2DcUyd3RQnydr3eAto4Az7",
        "           1  12D3KooWPeer",
        "discovery  lan: 2 peers heard",
        "running    1 h 1 min, pid 7, sparkle-mesh 0.1.0",
    ]
    assert "view       none yet" in render.status_text(fake.status(view=None))


def test_a_table_of_peers(fake: ModuleType) -> None:
    peers = [
        fake.peer(link="tcp", bandwidth_bytes_per_s=11.94e6, machine=fake.PEER_ID),
        fake.peer("12D3", rank=None, latency_ms=None, addresses=(), admitted=False, connected_s=0.0),
    ]
    assert render.peers_text(peers).splitlines() == [
        "PEER          ROLE          MACHINE    RANK  LINK  LATENCY  BANDWIDTH  CONNECTED  ADDRESS",
        "12D3KooWPeer  trainer       …eAto4Az7  1     tcp   0.2 ms   11.9 MB/s  1 min 1 s  /ip4/10.0.0.2/tcp/4",
        "12D3          not admitted  -          -     -     -        -          0 s        -",
    ]
    assert render.peers_text([]) == "no peers"


def test_a_table_of_devices_that_were_found(fake: ModuleType) -> None:
    unmeasured = type(fake.found().device)(kind="cpu", index=0, name="A CPU", memory_bytes=0)
    found = [fake.found(), fake.found("12D3", device=unmeasured, addresses=(), age_s=0.0)]
    assert render.found_devices_text(found).splitlines() == [
        "PEER          DEVICE  NAME   MEMORY    GFLOP/S        AGE  ADDRESS",
        "12D3KooWPeer  cuda 1  A GPU  24.0 GiB  float32 82600  7 s  /ip4/10.0.0.2/tcp/4",
        "12D3          cpu 0   A CPU  -         -              0 s  -",
    ]
    assert render.found_devices_text([]) == "no devices"


def test_devices_for_people(fake: ModuleType) -> None:
    cpu = fake.status().devices[0]
    gpu = type(cpu)(
        kind="cuda", index=1, name="NVIDIA H200", memory_bytes=150754820096, features=("sm_90",), driver="580.1"
    )
    assert render.device_text(gpu) == "cuda 1: NVIDIA H200, 140.4 GiB, sm_90, driver 580.1"
    unknown = type(cpu)(kind="cpu", index=0, name="unknown", memory_bytes=0)
    assert render.device_text(unknown) == "cpu 0: unknown"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3661, "1 h 1 min"), (90000, "1 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


@pytest.mark.parametrize(
    ("bytes_per_s", "text"),
    [(0, "0 B/s"), (999, "999 B/s"), (1500, "1.5 kB/s"), (2e6, "2 MB/s"), (1.234e10, "12.3 GB/s")],
)
def test_rates(bytes_per_s: float, text: str) -> None:
    assert render.rate(bytes_per_s) == text


def test_peers_cannot_write_on_the_terminal(fake: ModuleType) -> None:
    hostile = type(fake.found().device)(kind=HOSTILE, index=0, name=HOSTILE, memory_bytes=1, gflops={HOSTILE: 1.0})
    texts = [
        render.peer_joined(fake.peer(HOSTILE, role=HOSTILE, addresses=(HOSTILE,))).text,
        render.peer_left(HOSTILE, HOSTILE).text,
        render.peer_refused(HOSTILE, HOSTILE).text,
        render.log_line("info", "x", HOSTILE).text,
        render.failed(HOSTILE).text,
        *render.peers_text([fake.peer(HOSTILE, role=HOSTILE, addresses=(HOSTILE,))]).splitlines(),
        *render.found_devices_text([fake.found(HOSTILE, addresses=(HOSTILE,), device=hostile)]).splitlines(),
        *render.status_text(fake.status(peer_id=HOSTILE, mesh=HOSTILE, discovery=(HOSTILE,))).splitlines(),
    ]
    for text in texts:
        assert text.isprintable()


@given(st.text(st.characters()))
def test_printable_text_is_printable_and_plain_text_stays(text: str) -> None:
    assert render.printable(text).isprintable()
    assert render.one_line(text).isprintable()
    if text.isprintable():
        assert render.printable(text) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_is_one_line(text: str) -> None:
    line = render.peer_left(text, text).to_json(1.5)
    assert "\n" not in line
    assert json.loads(line)["reason"] == text


def test_a_directory_with_a_name_that_is_no_text(fake: ModuleType) -> None:
    line = render.started(fake.status(), Path("/data\udcff"))
    assert json.loads(line.to_json(0))["data_dir"] == "/data\\udcff"
