"""The membership runner over an in-process control plane, under a virtual clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from sparkle_mesh import limits
from sparkle_mesh.errors import ClosedError, LinkClosedError
from sparkle_mesh.fabric.framing import receive_message, send_message
from sparkle_mesh.fabric.identity import Identity, load_or_create_identity
from sparkle_mesh.fabric.memory import MemoryFabric, MemoryFabricNetwork
from sparkle_mesh.membership.certificates import Certifier, sign_certificate
from sparkle_mesh.membership.events import MembershipEvent, PeerAdmitted, PeerGone, PeerRefused, ViewChanged
from sparkle_mesh.membership.keys import MeshKey, MeshSecrets
from sparkle_mesh.membership.messages import (
    PROTOCOL,
    Chosen,
    Greeting,
    Hello,
    Introduction,
    Leave,
    Meeting,
    Merger,
    MeshMessage,
    Refused,
    Role,
)
from sparkle_mesh.membership.proof import OpenerProof, Say
from sparkle_mesh.membership.revocations import sign_revocations
from sparkle_mesh.membership.service import MembershipService
from sparkle_mesh.membership.view import Member, View
from sparkle_mesh.nurseries import bare_errors

KEY = MeshKey(b"k" * 32)
OTHER_KEY = MeshKey(b"o" * 32)


class Peer:
    """One process: a fabric and a membership service on it, and all that it reported."""

    def __init__(self, fabric: MemoryFabric, service: MembershipService, nursery: trio.Nursery) -> None:
        self.fabric, self.service, self.nursery = fabric, service, nursery
        self.events: list[MembershipEvent] = []
        self.heard: list[tuple[str, tuple[str, ...], str]] = []
        self.died = ""
        self._changed = trio.Event()

    async def watch(self, events: trio.MemoryReceiveChannel[MembershipEvent]) -> None:
        async for event in events:
            self.events.append(event)
            self._changed.set()
            self._changed = trio.Event()

    async def until(self, kind: type, count: int = 1) -> list[MembershipEvent]:
        """Wait until ``count`` events of ``kind`` came; return all of them."""
        with trio.fail_after(120):
            while len(found := [event for event in self.events if isinstance(event, kind)]) < count:
                await self._changed.wait()
        return found


class Mesh:
    """Peers on one network."""

    def __init__(self, nursery: trio.Nursery, network: MemoryFabricNetwork) -> None:
        self.nursery, self.network = nursery, network

    async def start(
        self,
        name: str,
        *,
        key: MeshKey | None = KEY,
        role: Role = "trainer",
        min_peers: int = 2,
        public: bool = False,
        address: str | None = None,
        certifier: Certifier | None = None,
    ) -> Peer:
        return await self.nursery.start(self._run, name, key, role, min_peers, public, address, certifier)  # type: ignore[no-any-return]

    async def _run(
        self,
        name: str,
        key: MeshKey | None,
        role: Role,
        min_peers: int,
        public: bool,
        address: str | None,
        certifier: Certifier | None,
        *,
        task_status: trio.TaskStatus[Peer],
    ) -> None:
        addresses = (address,) if address else None
        async with self.network.open(name, addresses=addresses) as fabric, trio.open_nursery() as nursery:
            heard: list[tuple[str, tuple[str, ...], str]] = []

            def hear(peer_id: str, addresses: Sequence[str], source: str, role: str) -> None:
                heard.append((peer_id, tuple(addresses), source))

            service = MembershipService(
                fabric,
                MeshSecrets("run", key),
                role=role,
                host_id=b"h" * 16,
                incarnation=name.encode()[:1] * 16,
                min_peers=min_peers,
                public=public,
                certifier=certifier,
                heard=hear,
            )
            peer = Peer(fabric, service, nursery)
            peer.heard = heard
            with service.events() as events:
                nursery.start_soon(peer.watch, events)
                try:
                    with bare_errors():
                        async with trio.open_nursery() as running:
                            await running.start(service.run)
                            task_status.started(peer)
                except ClosedError as error:
                    peer.died = str(error)
                await trio.sleep_forever()


async def join(*peers: Peer) -> None:
    for index, peer in enumerate(peers):
        for other in peers[index + 1 :]:
            await peer.fabric.connect(other.fabric.peer_id, other.fabric.addresses)


@asynccontextmanager
async def open_mesh(delay_s: float = 0.0) -> AsyncIterator[Mesh]:
    async with trio.open_nursery() as nursery:
        yield Mesh(nursery, MemoryFabricNetwork(delay_s=delay_s))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("delay_s", [0.0, 0.05])
async def test_connected_peers_prove_the_key_and_agree_on_a_view(
    autojump_clock: trio.testing.MockClock, delay_s: float
) -> None:
    async with open_mesh(delay_s) as mesh:
        peers = [await mesh.start(name, min_peers=3) for name in "abc"]
        node = await mesh.start("n", role="node")
        await join(*peers, node)
        views = []
        for peer in peers:
            (changed,) = await peer.until(ViewChanged)
            assert isinstance(changed, ViewChanged)
            assert changed.mine
            views.append(changed.view)
        assert views[0] == views[1] == views[2]
        assert [member.peer_id for member in views[0].members] == ["a", "b", "c"]
        (watched,) = await node.until(ViewChanged)
        assert watched == ViewChanged(views[0], mine=False)
        assert node.service.view == views[0]
        assert peers[0].service.is_admitted("b")
        await trio.sleep(2 * limits.PING_INTERVAL_S)
        latency = peers[0].service.channels["b"].latency_s
        assert latency is not None
        assert latency == pytest.approx(delay_s, abs=1e-6)
        sources = {source for _, _, source in peers[2].heard}
        assert sources == {"introduction", "exchange"}


async def test_a_wrong_key_is_told_to_both_and_is_no_peer(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        ours, theirs = await mesh.start("a"), await mesh.start("b", key=OTHER_KEY)
        await join(ours, theirs)
        for peer, other in ((ours, "b"), (theirs, "a")):
            (refused,) = await peer.until(PeerRefused)
            assert isinstance(refused, PeerRefused)
            assert (refused.peer_id, refused.wrong_key) == (other, True)
            assert "the key is wrong" in refused.reason
            assert peer.service.channels == {}


async def test_an_open_mesh_is_for_this_host_and_its_lan(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        far = await mesh.start("a", key=None, address="/ip4/8.8.8.8/tcp/1")
        near = await mesh.start("b", key=None)
        public = await mesh.start("c", key=None, public=True)
        await join(far, near, public)
        (refused,) = await far.until(PeerRefused)
        assert isinstance(refused, PeerRefused)
        assert refused.peer_id == "b"
        assert "LAN only" in refused.reason
        (admitted,) = await far.until(PeerAdmitted)
        assert isinstance(admitted, PeerAdmitted)
        assert admitted.peer_id == "c"


async def test_leaving_and_dying_are_told_apart(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        stays, leaves, dies = [await mesh.start(name, min_peers=3) for name in "abc"]
        await join(stays, leaves, dies)
        await stays.until(ViewChanged)
        await leaves.service.leave("done")
        (gone,) = await stays.until(PeerGone)
        assert isinstance(gone, PeerGone)
        assert gone.graceful
        assert gone.reason == "it left the mesh: done"
        mesh.network.kill("c")
        gone = (await stays.until(PeerGone, 2))[1]
        assert isinstance(gone, PeerGone)
        assert (gone.peer_id, gone.graceful) == ("c", False)
        await trio.testing.wait_all_tasks_blocked()
        assert "the fabric closed" in dies.died


async def test_silence_is_noticed_within_its_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        a, b = await mesh.start("a"), await mesh.start("b")
        await join(a, b)
        await a.until(ViewChanged)
        before = trio.current_time()
        mesh.network.partition({"a"}, {"b"})
        (gone,) = await a.until(PeerGone)
        assert isinstance(gone, PeerGone)
        assert "silent" in gone.reason
        assert trio.current_time() - before < limits.SILENCE_TIMEOUT_S + 2 * limits.PING_INTERVAL_S


async def test_who_did_not_run_itself_blames_nobody(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        a, b = await mesh.start("a"), await mesh.start("b")
        await join(a, b)
        await a.until(ViewChanged)
        autojump_clock.jump(10 * limits.SILENCE_TIMEOUT_S)
        await trio.sleep(limits.SILENCE_TIMEOUT_S)
        assert a.service.is_admitted("b")
        assert b.service.is_admitted("a")


async def test_a_peer_that_comes_again_replaces_its_old_stream(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        b = await mesh.start("b")
        async with impostor(mesh, "a") as (stream, _):
            await b.until(PeerAdmitted)
            second = await impostor_fabric(mesh, "a").open_stream("b", PROTOCOL)
            await prove(second, "a", "b")
            await b.until(PeerAdmitted, 2)
            with pytest.raises(ClosedError):
                await read_to_the_end(stream)


async def read_to_the_end(stream: object) -> None:
    while True:
        await receive_message(stream, MeshMessage)  # type: ignore[arg-type]


def impostor_fabric(mesh: Mesh, name: str) -> MemoryFabric:
    return mesh.network._fabrics[name]


async def prove(stream: object, me: str, peer: str, *, introduce_as: str | None = None, **told: Any) -> None:
    proof = OpenerProof(MeshSecrets("run", KEY), me=me, peer=peer, nonce=b"n" * 32)
    instructions = proof.start()
    while instructions:
        for instruction in instructions:
            if isinstance(instruction, Say):
                await send_message(stream, instruction.message)  # type: ignore[arg-type]
        if len(instructions) > 1:
            break
        instructions = proof.receive(await receive_message(stream, Greeting))  # type: ignore[arg-type]
    introduction = Introduction(
        role="trainer",
        member=Member(peer_id=introduce_as or me, incarnation=b"i" * 16),
        host_id=b"h" * 16,
        min_peers=9,
        addresses=(),
        **told,
    )
    await send_message(stream, introduction)  # type: ignore[arg-type]


@asynccontextmanager
async def impostor(mesh: Mesh, name: str, **told: Any) -> AsyncIterator[tuple[object, MemoryFabric]]:
    """A hand-made peer that holds the key, connected to ``b``."""
    async with mesh.network.open(name) as fabric:
        target = mesh.network._fabrics["b"]
        await fabric.connect("b", target.addresses)
        stream = await fabric.open_stream("b", PROTOCOL)
        await prove(stream, name, "b", **told)
        yield stream, fabric


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Refused(code="full", reason="?"), "peer a refused: ?"),
        (Hello(version_min=1, version_max=1, nonce=bytes(32)), "broke the protocol"),
        (Leave(reason="bored"), "it left the mesh: bored"),
    ],
)
async def test_how_a_channel_ends_is_told(
    autojump_clock: trio.testing.MockClock, message: Leave | Refused | Hello, reason: str
) -> None:
    async with open_mesh() as mesh:
        b = await mesh.start("b")
        async with impostor(mesh, "a") as (stream, _):
            await b.until(PeerAdmitted)
            await send_message(stream, message)  # type: ignore[arg-type]
            (gone,) = await b.until(PeerGone)
            assert isinstance(gone, PeerGone)
            assert reason in gone.reason


async def test_only_who_is_in_a_mesh_speaks_for_it(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever is admitted and in no mesh cannot have one dissolved; a lead of another one can, and all are told."""
    async with open_mesh() as mesh:
        b, c = await mesh.start("b"), await mesh.start("c")
        await join(b, c)
        (changed,) = await b.until(ViewChanged)
        assert isinstance(changed, ViewChanged)
        mine, low = changed.view, bytes(32)
        async with impostor(mesh, "a") as (stream, _):
            await b.until(PeerAdmitted, 2)
            me = b.service.member_of("a")
            assert me is not None
            meeting = Meeting(lineage=low, step=2**60, operations=9, size=9)
            for message in (meeting, Merger(dissolves=mine.lineage, into=low)):
                await send_message(stream, message)  # type: ignore[arg-type]
            await trio.sleep(1)
            assert b.service.verdict is None
            theirs = View(mesh_id=mine.mesh_id, lineage=low, epoch=1, members=(me,))
            for said in (Chosen(view=theirs), meeting):
                await send_message(stream, said)  # type: ignore[arg-type]
            await trio.sleep(1)
            verdict = Merger(dissolves=mine.lineage, into=low)
            assert (b.service.verdict, c.service.verdict) == (verdict, verdict)
            assert b.service.succession.ended
            assert c.service.succession.ended
            # What is said then changes nothing; and whoever comes is told.
            await send_message(stream, meeting)  # type: ignore[arg-type]
            await trio.sleep(1)
            assert b.service.is_admitted("a")


async def test_who_leaves_admits_nobody_any_more(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        b, c = await mesh.start("b"), await mesh.start("c")
        await c.service.leave(hurry=True)
        await join(b, c)
        (refused,) = await b.until(PeerRefused)
        assert isinstance(refused, PeerRefused)
        assert "has left the mesh" in refused.reason


async def test_garbage_after_the_proof_ends_that_peer_alone(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        b, c = await mesh.start("b"), await mesh.start("c")
        await join(b, c)
        await b.until(ViewChanged)
        async with impostor(mesh, "a") as (stream, _):
            await b.until(PeerAdmitted, 2)
            await stream.write(b"\x00\x00\x00\x04junk")  # type: ignore[attr-defined]
            (gone,) = await b.until(PeerGone)
            assert isinstance(gone, PeerGone)
            assert "broke the protocol" in gone.reason
        assert b.service.is_admitted("c")


async def test_who_breaks_the_protocol_again_and_again_is_banned_for_a_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_mesh() as mesh:
        b = await mesh.start("b")
        for count in range(1, limits.OFFENCES_MAX_COUNT + 1):
            async with impostor(mesh, "a") as (stream, _):
                await b.until(PeerAdmitted, count)
                await stream.write(b"\x00\x00\x00\x04junk")  # type: ignore[attr-defined]
                await b.until(PeerGone, count)
        async with mesh.network.open("a") as fabric:
            await fabric.connect("b", b.fabric.addresses)
            stream = await fabric.open_stream("b", PROTOCOL)
            assert "too often: not for another 600 s" in str(await receive_message(stream, Greeting))
            assert "too often" in str((await b.until(PeerRefused))[-1])
            # Nor is it asked in.
            await b.service._open("a")
            assert len(await b.until(PeerRefused, 2)) == 2
        await trio.sleep(limits.BAN_MIN_S)
        async with impostor(mesh, "a"):
            await b.until(PeerAdmitted, limits.OFFENCES_MAX_COUNT + 1)


async def test_an_introduction_under_another_name_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh:
        b = await mesh.start("b")
        async with impostor(mesh, "a", introduce_as="z"):
            (refused,) = await b.until(PeerRefused)
            assert isinstance(refused, PeerRefused)
            assert "introduced itself as z" in refused.reason


async def test_trainers_show_which_machine_they_are_of(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    machine = load_or_create_identity(tmp_path / "identity.key").peer_id
    async with open_mesh() as mesh:
        # Of two, the one with the smaller name opens: each way once.
        a, c = [
            await mesh.start(name, certifier=Certifier(tmp_path / "identity.key", name, MeshSecrets("run", KEY).tag))
            for name in "ac"
        ]
        b = await mesh.start("b", certifier=Certifier(tmp_path / "absent", "b", MeshSecrets("run", KEY).tag))
        node = await mesh.start("n", role="node")
        await join(a, b, c, node)
        for peer in (a, b, c, node):
            await peer.until(PeerAdmitted, 3)
            machines = {name: channel.machine for name, channel in peer.service.channels.items()}
            assert machines.items() <= {"a": machine, "b": None, "c": machine, "n": "n"}.items()


@pytest.mark.parametrize("what", ["certificate", "revocations"])
async def test_what_is_forged_is_refused_with_a_reason(autojump_clock: trio.testing.MockClock, what: str) -> None:
    identity, tag = Identity.generate(), MeshSecrets("run", KEY).tag
    told, reason = {
        "certificate": (sign_certificate(identity, "c", tag), "is that of 'c'"),
        "revocations": (sign_revocations(identity, bytes(32), sequence=1, revoked=()), "for another mesh"),
    }[what]
    async with open_mesh() as mesh:
        b = await mesh.start("b")
        b.service._revocations.founder = identity.peer_id
        for count in range(1, limits.OFFENCES_MAX_COUNT + 1):
            async with impostor(mesh, "a", **{what: told}) as (stream, _):
                refused = (await b.until(PeerRefused, count))[-1]
                assert isinstance(refused, PeerRefused)
                assert reason in refused.reason
                heard = await receive_message(stream, MeshMessage)  # type: ignore[arg-type]
                assert isinstance(heard, Refused)
                assert heard.reason == refused.reason
        assert b.service.channels == {}
        assert "too often" in str(b.service._door.ban("a", trio.current_time()))


async def test_who_is_revoked_is_let_go_at_once_and_told_why(autojump_clock: trio.testing.MockClock) -> None:
    founder = Identity.generate()
    async with open_mesh() as mesh:
        b, c = await mesh.start("b", min_peers=3), await mesh.start("c", min_peers=3)
        await join(b, c)
        b.service._revocations.founder = founder.peer_id
        news = sign_revocations(founder, MeshSecrets("run", KEY).tag, sequence=1, revoked=["a"])
        async with impostor(mesh, "a") as (stream, _):
            await b.until(PeerAdmitted, 2)
            assert b.service.take_revocations(news)
            assert not b.service.is_admitted("a")
            while not isinstance(heard := await receive_message(stream, MeshMessage), Refused):  # type: ignore[arg-type]
                assert not isinstance(heard, Leave)
            assert heard.reason == "a was revoked by the mesh's founder"
            (gone,) = await b.until(PeerGone)
            assert gone == PeerGone("a", heard.reason, graceful=True)
            await b.until(PeerRefused)
        assert not b.service.take_revocations(news)
        assert list(b.service.channels) == ["c"]


async def test_an_answerer_that_is_refused_hears_why(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """It has taken the opener in already when that has seen its certificate."""
    load_or_create_identity(tmp_path / "identity.key")
    wrong = Certifier(tmp_path / "identity.key", "somebody else", MeshSecrets("run", KEY).tag)
    async with open_mesh() as mesh:
        a, b = await mesh.start("a"), await mesh.start("b", certifier=wrong)
        await join(a, b)
        for peer in (a, b):
            (refused,) = await peer.until(PeerRefused)
            assert isinstance(refused, PeerRefused)
            assert "is that of 'somebody else'" in refused.reason
        await b.until(PeerGone)
        assert a.service.channels == b.service.channels == {}


async def test_a_peer_that_never_finishes_the_proof_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh, mesh.network.open("a") as fabric:
        b = await mesh.start("b")
        await fabric.connect("b", b.fabric.addresses)
        stream = await fabric.open_stream("b", PROTOCOL)
        await send_message(stream, Hello(version_min=1, version_max=1, nonce=b"n" * 32))
        (refused,) = await b.until(PeerRefused)
        assert isinstance(refused, PeerRefused)
        assert "did not finish the proof" in refused.reason


async def test_peers_that_do_not_speak_the_protocol_are_reported(autojump_clock: trio.testing.MockClock) -> None:
    async with open_mesh() as mesh, mesh.network.open("z") as stranger:
        a = await mesh.start("a")
        await a.fabric.connect("z", stranger.addresses)
        (refused,) = await a.until(PeerRefused)
        assert isinstance(refused, PeerRefused)
        assert not refused.wrong_key


async def test_a_message_for_a_peer_that_does_not_read_lets_it_go(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MESH_OUTBOX_MAX_COUNT", 4)
    async with open_mesh() as mesh:
        a, b = await mesh.start("a"), await mesh.start("b")
        await join(a, b)
        await a.until(ViewChanged)
        channel = a.service.channels["b"]
        for _ in range(6):
            channel.send(Leave())
        (gone,) = await a.until(PeerGone)
        assert isinstance(gone, PeerGone)
        assert "does not read" in gone.reason
        channel.send(Leave())
    assert issubclass(LinkClosedError, ClosedError)
