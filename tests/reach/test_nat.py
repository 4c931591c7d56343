"""Trainers behind NATs, in network namespaces: who reaches whom how, by kind of NAT."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkle_mesh.membership.keys import MeshKey
from tests.interop.go_peer import daemon_command, needs_go
from tests.reach.lines import read_lines
from tests.reach.nat_lab import PORT, Host, NatKind, NatLab, needs_namespaces

pytestmark = [pytest.mark.namespaces, needs_namespaces, pytest.mark.timeout(120)]

TRAINER = Path(__file__).with_name("trainer.py")


@pytest.fixture
def lab() -> Iterator[NatLab]:
    with NatLab("nat") as lab:
        yield lab


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    MeshKey.generate().save(tmp_path / "mesh.key")
    return tmp_path / "mesh.key"


def start_node(host: Host, data_dir: Path, key_file: Path, *options: str) -> str:
    """Start ``sparkle-node`` and return its address."""
    node = host.start(
        sys.executable, "-m", "sparkle_mesh.cli.node", "--mesh", "nat-test", "--key-file", key_file,
        "--data-dir", data_dir, "--listen", f"/ip4/{host.address}/tcp/{PORT}", "--no-lan",
        "--no-port-mapping", *options,
    )  # fmt: skip
    lines = read_lines(node, until="data ", timeout_s=30)
    return next(line.split()[-1] for line in lines if line.startswith("address"))


def train(hosts: list[Host], tmp_path: Path, key_file: Path, *, bootstrap: str = "", join: str = "") -> list[Any]:
    """Run a trainer on each of ``hosts``; return what they tell."""
    trainers = [
        host.start(
            sys.executable,
            TRAINER,
            tmp_path / f"t{number}",
            key_file,
            bootstrap,
            str(len(hosts)),
            *filter(None, [join]),
        )
        for number, host in enumerate(hosts)
    ]
    told = []
    for trainer in trainers:
        line = read_lines(trainer, until='{"rank"', timeout_s=70)[-1]
        told.append(json.loads(line))
    for trainer in trainers:
        assert trainer.wait(20) == 0
    return told


def ways(told: list[Any]) -> set[str]:
    """How the trainers are connected to each other."""
    return {"relayed" if "p2p-circuit" in way else "direct" for facts in told for way in facts["members"].values()}


@pytest.mark.parametrize(
    ("one", "other", "way"),
    [
        ("cone", "cone", "direct"),
        ("cone", "symmetric", "relayed"),
        ("symmetric", "symmetric", "relayed"),
        ("forwarding", "symmetric", "direct"),
    ],
)
def test_two_behind_nats_reduce_with_a_node_as_their_relay(
    lab: NatLab, tmp_path: Path, key_file: Path, one: NatKind, other: NatKind, way: str
) -> None:
    relay = start_node(lab.public_host(), tmp_path / "relay", key_file)
    hosts = [lab.host_behind(kind)[0] for kind in (one, other)]
    told = train(hosts, tmp_path, key_file, join=relay)
    assert [facts["size"] for facts in told] == [2, 2]
    assert all(facts["right"] for facts in told)
    assert ways(told) == {way}


@needs_go
@pytest.mark.interop
def test_two_behind_nats_meet_in_go_libp2ps_dht_and_punch_a_hole_with_its_relay(
    lab: NatLab, tmp_path: Path, key_file: Path
) -> None:
    public = lab.public_host()
    daemon = public.start(*daemon_command(tmp_path, f"/ip4/{public.address}/tcp/{PORT}", "-relayService=1", "-autonat"))
    lines = read_lines(daemon, until="/ip4/", timeout_s=20)
    peer_id = next(line.split()[-1] for line in lines if line.startswith("Peer ID:"))
    bootstrap = f"/ip4/{public.address}/tcp/{PORT}/p2p/{peer_id}"
    told = train([lab.host_behind("cone")[0], lab.host_behind("cone")[0]], tmp_path, key_file, bootstrap=bootstrap)
    assert all(facts["right"] and facts["size"] == 2 for facts in told)
    assert ways(told) == {"direct"}


@needs_go
@pytest.mark.interop
def test_two_behind_nats_that_let_no_hole_be_punched_reduce_through_go_libp2ps_relay(
    lab: NatLab, tmp_path: Path, key_file: Path
) -> None:
    hosts = [lab.host_behind("symmetric")[0], lab.host_behind("symmetric")[0]]
    for attempt in range(8):
        # Two services of the daemon compete for the protocol; one carries 4 GiB, the other 128 KiB.
        public = lab.public_host()
        folder = tmp_path / str(attempt)
        folder.mkdir()
        options = ("-relayService=1", "-autonat", "-forceReachabilityPublic")
        daemon = public.start(*daemon_command(folder, f"/ip4/{public.address}/tcp/{PORT}", *options))
        lines = read_lines(daemon, until="/ip4/", timeout_s=20)
        peer_id = next(line.split()[-1] for line in lines if line.startswith("Peer ID:"))
        bootstrap = f"/ip4/{public.address}/tcp/{PORT}/p2p/{peer_id}"
        if carries_much(public, bootstrap):
            told = train(hosts, folder, key_file, bootstrap=bootstrap)
            assert all(facts["right"] and facts["size"] == 2 for facts in told)
            assert ways(told) == {"relayed"}
            return
    pytest.fail("the daemon never offered the relay that carries 4 GiB")


MINIUPNPD = shutil.which("miniupnpd")


@pytest.mark.skipif(MINIUPNPD is None, reason="needs a router: `apt-get install miniupnpd`, as .ci/run does")
@pytest.mark.parametrize("how", ["NAT-PMP", "UPnP"])
def test_a_router_that_maps_ports_makes_a_host_behind_it_one_that_others_dial(
    lab: NatLab, tmp_path: Path, key_file: Path, how: str
) -> None:
    public = lab.public_host()
    host, nat = lab.host_behind("mapping")
    config = tmp_path / "miniupnpd.conf"
    config.write_text(
        "ext_ifname=wan\nlistening_ip=lan\nport=5000\nuuid=00000000-0000-0000-0000-000000000001\n"
        f"enable_natpmp={'yes' if how == 'NAT-PMP' else 'no'}\nenable_upnp={'yes' if how == 'UPnP' else 'no'}\n"
        f"ext_ip={nat.address}\nsecure_mode=yes\nlease_file={tmp_path / 'leases'}\n"
        "allow 1024-65535 192.168.1.0/24 1024-65535\ndeny 0-65535 0.0.0.0/0 0-65535\n"
    )
    router = nat.start(str(MINIUPNPD), "-f", config, "-d", "-P", tmp_path / "miniupnpd.pid")
    read_lines(router, until="istening ", timeout_s=20)
    first = start_node(public, tmp_path / "public", key_file)
    node = host.start(
        sys.executable, "-m", "sparkle_mesh.cli.node", "--mesh", "nat-test", "--key-file", key_file, "--data-dir",
        tmp_path / "hidden", "--no-lan", "--join", first, "--bootstrap", first, "--log-level", "info",
    )  # fmt: skip
    read_lines(node, until=f"can be reached at: /ip4/{nat.address}/tcp/{PORT}", timeout_s=50)


def carries_much(host: Host, relay: str) -> bool:
    """Whether a relay that ``host`` can dial gives circuits that carry as much as anybody likes."""
    script = f"""
import trio
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.fabric.libp2p_fabric import open_libp2p_fabric

async def main():
    address, _, relay_id = {relay!r}.rpartition("/p2p/")
    async with open_libp2p_fabric(Identity.generate()) as fabric:
        await fabric.connect(relay_id, [address])
        print("much" if (await fabric.reach.relays.reserve(relay_id)).carries_bytes is None else "little")

trio.run(main)
"""
    command = ["ip", "netns", "exec", host.namespace, sys.executable, "-c", script]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    return answer.stdout.strip() == "much"
