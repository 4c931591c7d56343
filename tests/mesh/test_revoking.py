"""A founder throws a machine out of a mesh: nodes on the real control plane let go of it, and remember."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from sparkle_mesh import limits
from sparkle_mesh.environment import IDENTITY_NAME
from sparkle_mesh.errors import UsageError
from sparkle_mesh.fabric.identity import Identity, load_or_create_identity
from sparkle_mesh.membership.events import PeerRefused
from sparkle_mesh.membership.invite import Invite
from sparkle_mesh.node import MeshNode, open_node
from tests.mesh.nodes import KEY, config, until, until_joined


async def test_who_is_revoked_is_let_go_and_does_not_come_back(tmp_path: Path) -> None:
    founder_id, lost = (load_or_create_identity(tmp_path / name / IDENTITY_NAME).peer_id for name in ("f", "lost"))
    async with AsyncExitStack() as stack:

        async def start(folder: str, **changes: Any) -> MeshNode:
            return await stack.enter_async_context(open_node(config(tmp_path / folder, **changes)))

        founder = await start("f", founder=founder_id)
        invite = founder.invite()
        assert Invite.decode(invite).founder == founder_id
        other = await start("o", join=(invite,))
        node = await start("lost", join=(invite,))
        trainer = await start("lost", role="trainer", join=(invite,))
        everybody = (founder, other, node, trainer)
        for one in everybody:
            await until_joined(one, *(peer for peer in everybody if peer is not one))
        with pytest.raises(UsageError, match="only the founder of a mesh revokes peers"):
            other.revoke(lost)
        async with trio.open_nursery() as nursery:
            for one in (founder, other):
                nursery.start_soon(until_joined, one, *({founder, other} - {one}))
            assert founder.revoke(lost).revoked == (lost,)
        assert (founder.status().revoked_count, other.status().revoked_count) == (1, 1)
        # It comes again at once, as a node that was started anew does, and is refused, with the reason.
        again = await stack.enter_async_context(open_node(config(tmp_path / "lost", role="trainer")))
        async with trio.open_nursery() as nursery:
            told = f"{lost}, the machine that {again.peer_id} is of, was revoked by the mesh's founder"
            for one, peer in ((other, again), (again, other)):
                nursery.start_soon(
                    until,
                    one,
                    lambda e, peer=peer: isinstance(e, PeerRefused) and e.peer_id == peer.peer_id and told in e.reason,
                )
            await trio.testing.wait_all_tasks_blocked()
            again.discovery.heard(other.peer_id, other.fabric.addresses, "exchange")
    # It is remembered, and told to those who were not there: here by a member that is not the founder.
    async with AsyncExitStack() as stack:
        other = await stack.enter_async_context(open_node(config(tmp_path / "o")))
        assert other.status().revoked_count == 1
        newcomer = await stack.enter_async_context(open_node(config(tmp_path / "n", join=(invite, other.invite()))))
        await until_joined(newcomer, other)
        assert newcomer.revocations.revoked == {lost}


async def test_processes_of_a_machine_know_the_founder_from_its_folder(tmp_path: Path) -> None:
    founder_id = load_or_create_identity(tmp_path / IDENTITY_NAME).peer_id
    async with open_node(config(tmp_path, founder=founder_id)) as node:
        async with open_node(config(tmp_path, role="trainer")) as trainer:
            assert trainer.revocations.founder == founder_id
            await until_joined(node, trainer)
        lost = Identity.generate().peer_id
        node.revoke(lost)
        async with open_node(config(tmp_path, role="trainer")) as trainer:
            assert trainer.revocations.revoked == {lost}
        assert node.status().founder == founder_id


async def test_news_that_got_lost_is_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REVOCATIONS_RENEW_S", 0.1)
    founder_id, lost = (load_or_create_identity(tmp_path / name / IDENTITY_NAME).peer_id for name in ("f", "lost"))
    async with open_node(config(tmp_path / "f", founder=founder_id)) as founder:
        invite = founder.invite()
        async with (
            open_node(config(tmp_path / "o", join=(invite,))) as other,
            open_node(config(tmp_path / "lost", join=(invite, other.invite()))) as node,
        ):
            await until_joined(other, founder, node)
            founder.membership.take_revocations(founder.revocations.revoking(founder.config.identity, lost))
            await until_joined(other, founder)


async def test_two_founders_are_one_too_many(tmp_path: Path) -> None:
    invites = tuple(Invite("run", KEY, (), founder=Identity.generate().peer_id).encode() for _ in range(2))
    with pytest.raises(UsageError, match="2 founders are named, and a mesh has one"):
        async with open_node(config(tmp_path, join=invites)):
            pytest.fail("opened")
