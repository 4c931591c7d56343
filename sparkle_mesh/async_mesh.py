"""A mesh for trio programs: the one implementation; :mod:`sparkle_mesh.mesh` holds it for ordinary threads."""

from __future__ import annotations

import os
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import trio
from numpy.typing import DTypeLike

from sparkle_mesh import limits
from sparkle_mesh.async_collectives import AsyncCollectives
from sparkle_mesh.capabilities.search import DeviceQuery, FoundDevice
from sparkle_mesh.collectives.calls import check_timeout
from sparkle_mesh.collectives.group import Outcome
from sparkle_mesh.discovery.bootstrap import choose_bootstrap
from sparkle_mesh.discovery.reach import ReachConfig
from sparkle_mesh.environment import bootstrap_peers, resolve_data_dir
from sparkle_mesh.errors import CollectiveTimeoutError, ForkedProcessError, MeshMergedError, UsageError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.membership.door import checked_allow
from sparkle_mesh.membership.invite import Invite, is_invite
from sparkle_mesh.membership.keys import KeyLike, MeshKey
from sparkle_mesh.membership.view import Member, View
from sparkle_mesh.mesh_life import Life, Lives
from sparkle_mesh.node import NodeConfig
from sparkle_mesh.nurseries import bare_errors
from sparkle_mesh.synchronization import Synchronized, Synchronizer
from sparkle_mesh.transport.connector import check_kinds

if TYPE_CHECKING:
    from sparkle_mesh.status import PeerStatus

_DEFAULT_LISTEN = ("/ip4/0.0.0.0/tcp/0",)


@dataclass(frozen=True, slots=True)
class MeshStats:
    """Bytes over this process's data links, headers and encryption included."""

    bytes_sent: int
    bytes_received: int


class AsyncMesh(AsyncCollectives):
    """A mesh this process is a member of, for trio programs; made by :func:`open_mesh`.

    All methods are for the trio run that opened it.
    """

    def __init__(self, lives: Lives) -> None:
        self._process = os.getpid()
        self._callbacks: list[Callable[[View], object]] = []
        self._lives = lives
        self._synchronizer = Synchronizer(self)
        self._take_up(lives.current)
        lives.taken_up = self._begin_anew

    def _take_up(self, life: Life) -> None:
        self._node, self._connector, self._follower = life.node, life.connector, life.follower
        self._group = life.group
        self._group.shown_changed = self._view_shown
        self._synchronizer = Synchronizer(self, self._synchronizer)

    def _begin_anew(self, life: Life) -> None:
        self._take_up(life)
        self._view_shown()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._node.config.mesh!r} rank {self.rank} of {self.size}>"

    # --- Who is here ----------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This process's position in the view, from 0."""
        rank = self.view.rank_of(self._node.membership.member)
        assert rank is not None
        return rank

    @property
    def size(self) -> int:
        """The number of members of the view."""
        return self.view.size

    @property
    def members(self) -> tuple[Member, ...]:
        """The members of the view; a member's position is its rank."""
        return self.view.members

    @property
    def view(self) -> View:
        """The agreed view of the last collective, or the one that was joined: it changes when a call ends."""
        return self._follower.views[self._group.shown[0]]

    def on_view_change(self, callback: Callable[[View], object]) -> None:
        """Call ``callback`` with the view whenever it has changed: when a call ends, before it returns."""
        self._callbacks.append(callback)

    def _view_shown(self) -> None:
        for callback in self._callbacks:
            callback(self.view)

    async def rejoin(self, *, min_peers: int | None = None, timeout_s: float | None = None) -> None:
        """Become a member once more, as a new one: after an error that says so, or to begin afresh.

        Whatever is in flight ends. This process is then a newcomer, of the mesh that there is, or of another that it
        forms with others: :meth:`synchronize` gives it the state of that. Arrays that were allocated stay; they are
        ordinary ones from now on. It has another peer id, and an invite from before does not lead to it any more.

        Parameters
        ----------
        min_peers
            The smallest acceptable view, this process included; as it was to begin with if None. After a
            QuorumLostError, 1 makes those that are left a mesh of their own: if others go on elsewhere, there are two.
        timeout_s
            Seconds to wait for it; as to begin with if None.

        Raises
        ------
        UsageError
            For arguments that cannot be.
        JoinTimeoutError
            If no view formed in time; it can be called again.
        """
        self._check_process()
        config = self._lives.config
        _check_terms(
            config.min_peers if min_peers is None else min_peers,
            self._lives.timeout_s if timeout_s is None else timeout_s,
        )
        await self._lives.begin_anew(min_peers, timeout_s)

    @property
    def peer_id(self) -> str:
        """This process's peer id, until it joins again."""
        return self._node.peer_id

    @property
    def last_outcome(self) -> Outcome | None:
        """How the last collective ended: contributors, epoch, algorithm, bytes, seconds."""
        return self._group.last_outcome

    @property
    def stats(self) -> MeshStats:
        """What the data links carried so far."""
        return MeshStats(
            bytes_sent=sum(link.stats.bytes_sent for link in self._follower.links.values()),
            bytes_received=sum(link.stats.bytes_received for link in self._follower.links.values()),
        )

    def peers(self) -> list[PeerStatus]:
        """Return all peers of the mesh that are connected now: members, latecomers and nodes.

        Latency and bandwidth of a member are those of the data link to it, measured by what passes over it.
        """
        return [self._with_link(peer) for peer in self._node.peers()]

    def _with_link(self, peer: PeerStatus) -> PeerStatus:
        member = self._node.membership.member_of(peer.peer_id)
        link = None if member is None else self._follower.links.get(member)
        if link is None:
            return peer
        stats = link.stats
        return msgspec.structs.replace(
            peer,
            link=link.kind,
            latency_ms=peer.latency_ms if stats.latency_s is None else stats.latency_s * 1e3,
            bandwidth_bytes_per_s=stats.bandwidth_bytes_per_s,
        )

    async def find_devices(
        self,
        kind: str | None = None,
        *,
        min_memory: int | float | str = 0,
        min_gflops: float = 0.0,
        dtype: str = "float32",
        limit: int = 100,
        timeout_s: float = limits.LOOKUP_TIMEOUT_S,
    ) -> list[FoundDevice]:
        """Return the devices of all machines of this mesh that fit, this one's among them.

        The fastest come first, then those with most memory. What a machine offers is known within seconds of its
        coming, and forgotten within a minute of its death; each result says how fresh it is.

        Parameters
        ----------
        kind
            ``"cpu"``, ``"cuda"``, ``"rocm"`` or ``"opencl"``; None for any.
        min_memory
            In bytes, or as text: ``"16GB"``, ``"16GiB"``.
        min_gflops, dtype
            10^9 floating-point operations a second, measured with arrays of this dtype. Devices that were not measured
            have none.
        limit
            How many to return at most.
        timeout_s
            For how long to look at most; what was found by then is returned.

        Raises
        ------
        UsageError
            If an argument is not of those that there are.
        """
        query = DeviceQuery.of(kind, min_memory=min_memory, min_gflops=min_gflops, dtype=dtype, limit=limit)
        return await self._node.find_devices(query, timeout_s=timeout_s)

    def invite(self) -> str:
        """Return one line of text with which others can join this mesh; it holds the key if there is one."""
        return self._node.invite()

    def allocate(self, shape: int | Sequence[int], dtype: DTypeLike = "float32") -> np.ndarray[Any, np.dtype[Any]]:
        """Return a new array, all zeros, in memory that the ranks of this host share: reduced there, it is not copied.

        An array like any other; it may outlive the mesh. Only a forked child does not get a copy of it, as of other
        memory: what either writes, both see. Where nothing is shared (other hosts, other users, other
        systems than Linux), it is an ordinary array.

        Parameters
        ----------
        shape
            As for :func:`numpy.zeros`.
        dtype
            float32 if not given.

        Raises
        ------
        UsageError
            If shape or dtype cannot be, or the dtype is not one of numbers.
        MemoryError
            If there is not so much memory.
        """
        try:
            like = np.broadcast_to(np.zeros((), dtype), shape)
        except (TypeError, ValueError) as error:
            raise UsageError(f"no array of shape {shape!r} and dtype {dtype!r} can be made: {error}") from error
        if like.dtype.kind not in "biufc":
            raise UsageError(f"dtype {like.dtype} is not one of numbers; allocate float32, float64 or integers")
        # After a failure to join again there is none.
        memory = None if self._lives.current.is_over else self._connector.memory
        nbytes = like.size * like.dtype.itemsize
        if memory is None or not nbytes:
            return np.zeros(like.shape, like.dtype)
        return memory.arena.allocate(nbytes).view(like.dtype).reshape(like.shape)

    async def synchronize(
        self,
        state: object = None,
        step: int = 0,
        *,
        on_drift: str = "repair",
        check: bool = False,
        timeout_s: float = limits.COLLECTIVE_TIMEOUT_S,
    ) -> Synchronized:
        """Bring all members to one state at a step boundary, and take in those who wait to join.

        Every member calls it at the same place of its program, with nothing else in flight; a process that has just
        joined calls it first. Where all are at one step and nobody waits it costs one small message. When
        another mesh was met that goes on, it comes back as a member of that; after QuorumLostError with
        ``on_quorum_loss="continue"`` it waits until this process is a member again.

        Parameters
        ----------
        state
            An array (of NumPy, or of PyTorch on the CPU: any that can be written to there), or a list, tuple or dict of
            arrays (such as a model's parameters and its optimizer's moments): the same names, shapes and dtypes on
            every member. Overwritten in place where it is not the reference: the state that most of those hold who were
            synchronised before, else that of the lowest rank among them; in a mesh that has just formed, or if one that
            comes from another mesh is further, that of the highest step. None to take in newcomers alone.
        step
            How many steps this member has done.
        on_drift
            What happens with a member that is not new and whose state differs: ``"repair"`` it, or ``"raise"``
            DivergenceError on all, and change nothing.
        check
            Compare states even where all are at one step; it costs hashing them.
        timeout_s
            Deadline in seconds.

        Returns
        -------
        Synchronized
            The step to go on with, and what was done.

        Raises
        ------
        UsageError, MismatchError, DivergenceError
            For a state that cannot be synchronised, states of other shapes, and drift that is not to be repaired.
        CollectiveTimeoutError
            If the deadline passed. What was received already stays; it can be called again.
        """
        self._check_process()
        timeout_s = check_timeout(timeout_s)
        deadline = trio.current_time() + timeout_s
        while True:
            await self._lives.until_back(deadline - trio.current_time())
            left_s = max(deadline - trio.current_time(), 0.0)
            try:
                return await self._synchronizer.run(state, step, on_drift=on_drift, check=check, timeout_s=left_s)
            except MeshMergedError as error:
                if not self._lives.is_coming_back:
                    raise
                if trio.current_time() >= deadline:
                    raise CollectiveTimeoutError(
                        f"after {timeout_s:.3g} s this process still waits to be taken in by the mesh that it has met,"
                        " whose members do so when all of them call synchronize; it can be called again"
                    ) from error

    # --- Inside ---------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ForkedProcessError(
                f"this mesh belongs to process {self._process}; the forked process {os.getpid()} cannot use it "
                "(join again here, or start workers by spawn)"
            )

    def close_in_child(self) -> None:
        """In a forked child: let go of every descriptor of the mesh, so that none outlives the parent."""
        self._connector.close_in_child()
        self._node.discovery.close_in_child()
        self._node.fabric.close_in_child()


# The meshes of this process, for its forks.
_meshes: weakref.WeakSet[AsyncMesh] = weakref.WeakSet()


def open_mesh(
    name: str,
    *,
    key: KeyLike = None,
    public: bool = False,
    min_peers: int = 2,
    timeout_s: float = limits.JOIN_TIMEOUT_S,
    join: Sequence[str] = (),
    listen: Sequence[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    lan: bool = True,
    bootstrap: Sequence[str] | None = None,
    links: Sequence[str] | None = None,
    on_quorum_loss: str = "raise",
    max_silence_s: float | None = None,
    allow: Sequence[str] | None = None,
) -> AbstractAsyncContextManager[AsyncMesh]:
    """Join a mesh from a trio program; parameters and errors as :func:`join`."""
    if not isinstance(name, str):
        raise UsageError(f"name is {name!r}; it must be text")
    _check_terms(min_peers, timeout_s)
    join, listen = _texts("join", join), _texts("listen", listen if listen is not None else _DEFAULT_LISTEN)
    if not listen:
        raise UsageError("listen is empty; give an address to listen on, or leave it out")
    if on_quorum_loss not in ("raise", "continue"):
        raise UsageError(f"on_quorum_loss is {on_quorum_loss!r}; it must be 'raise' or 'continue'")
    if links is not None:
        check_kinds(_texts("links", links))
    mesh_name, mesh_key, join = _resolve_invites(name, MeshKey.coerce(key), join)
    bootstrap = choose_bootstrap(
        None if bootstrap is None else _texts("bootstrap", bootstrap),
        mesh=mesh_name,
        keyed=mesh_key is not None,
        public=public,
        preset=bootstrap_peers(),
    )
    config = NodeConfig(
        mesh=mesh_name,
        key=mesh_key,
        public=public,
        role="trainer",
        identity=Identity.generate(),
        listen=tuple(listen),
        join=tuple(join),
        data_dir=resolve_data_dir(data_dir),
        lan=lan,
        min_peers=int(min_peers),
        max_silence_s=_silence(max_silence_s),
        reach=ReachConfig(bootstrap=bootstrap),
        allow=_allowed(allow),
    )
    return _open(config, timeout_s, links, forks=on_quorum_loss == "continue")


@asynccontextmanager
async def _open(
    config: NodeConfig, timeout_s: float, kinds: Sequence[str] | None, *, forks: bool
) -> AsyncIterator[AsyncMesh]:
    with bare_errors():
        async with trio.open_nursery() as nursery:
            lives = Lives(config, timeout_s, kinds, nursery, forks=forks)
            await lives.begin()
            mesh = AsyncMesh(lives)
            _meshes.add(mesh)
            try:
                yield mesh
            finally:
                await lives.end()
                nursery.cancel_scope.cancel()


def _silence(max_silence_s: Any) -> float:
    if max_silence_s is None:
        return limits.SUSPICION_CEILING_S
    low, high = limits.SUSPICION_CEILING_MIN_S, limits.SILENCE_TIMEOUT_S
    if not _is_number(max_silence_s, Real) or not low <= max_silence_s <= high:
        raise UsageError(f"max_silence_s is {max_silence_s!r}; give seconds from {low:g} to {high:g}, or None")
    return float(max_silence_s)


def _allowed(allow: Sequence[str] | None) -> tuple[str, ...]:
    if allow is None:
        return ()
    if not _texts("allow", allow):
        raise UsageError("allow is empty, so nobody could come in; name peers, or leave it out to let everybody in")
    return checked_allow("allow", allow)


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_terms(min_peers: Any, timeout_s: Any) -> None:
    if not _is_number(min_peers, Integral) or not _is_number(timeout_s, Real):
        raise UsageError(f"min_peers is {min_peers!r} and timeout_s {timeout_s!r}; give a whole number and seconds")
    if not 1 <= min_peers <= limits.MESH_MEMBERS_MAX_COUNT:
        raise UsageError(f"min_peers is {min_peers}; it must be from 1 to {limits.MESH_MEMBERS_MAX_COUNT}")
    if not 0 < timeout_s <= limits.TIMEOUT_MAX_S:
        raise UsageError(f"timeout_s is {timeout_s}; it must be positive and at most {limits.TIMEOUT_MAX_S:g}")


def _texts(what: str, given: object) -> Sequence[str]:
    """Return ``given`` if it is a list or tuple of texts. Its contents are not shown: an invite is a secret."""
    if not isinstance(given, (list, tuple)) or not all(isinstance(item, str) for item in given):
        raise UsageError(f"{what} is a {type(given).__name__}; give a list of texts, of one item if there is one")
    return given


def _resolve_invites(name: str, key: MeshKey | None, join: Sequence[str]) -> tuple[str, MeshKey | None, Sequence[str]]:
    """Take name and key from an invite where one stands in their place; refuse invites to another mesh."""
    if is_invite(name):
        join, name = [name, *join], Invite.decode(name).name
    for item in join:
        if is_invite(item):
            invite = Invite.decode(item)
            if invite.name != name:
                raise UsageError(f"the invite is to mesh {invite.name!r}, not {name!r}")
            if key is not None and invite.key is not None and key != invite.key:
                raise UsageError(f"the invite to {name!r} holds another key than the one given")
            key = key or invite.key
    return name, key, join


def _close_in_child() -> None:
    for mesh in list(_meshes):
        mesh.close_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
