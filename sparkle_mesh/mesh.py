"""The object that training code holds: a mesh for ordinary threads, over a trio run in a background thread."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from sparkle_mesh import limits
from sparkle_mesh.async_mesh import AsyncMesh, MeshStats, open_mesh
from sparkle_mesh.capabilities.search import FoundDevice
from sparkle_mesh.membership.invite import is_invite
from sparkle_mesh.membership.keys import KeyLike
from sparkle_mesh.membership.view import Member, View
from sparkle_mesh.mesh_collectives import Collectives
from sparkle_mesh.portal import Portal

if TYPE_CHECKING:
    from sparkle_mesh.collectives.group import Outcome
    from sparkle_mesh.status import PeerStatus
    from sparkle_mesh.synchronization import Synchronized

D = TypeVar("D")
T = TypeVar("T")

# The meshes of this process, for its end.
_meshes: weakref.WeakSet[Mesh] = weakref.WeakSet()


class Mesh(Collectives):
    """A mesh this process is a member of; made by :func:`join`, left by ``close()`` or the end of a ``with`` block.

    Methods may be called from any thread of the process that joined. Ctrl-C works at any moment: the call in
    progress is given up on every rank (they get :class:`~sparkle_mesh.errors.CollectiveAbortedError`), unless all ranks
    hold its result already; then the arrays hold it here, too, when the KeyboardInterrupt is raised.
    """

    def __init__(self, opening: AbstractAsyncContextManager[AsyncMesh], name: str) -> None:
        self._portal = Portal(f"sparkle-mesh {name}")
        self._process = os.getpid()
        try:
            self._mesh = self._portal.open(lambda: opening)
            self._view_callbacks = []
            self._told_epoch = (self._mesh._lives.count, self._mesh.view.epoch)
            _meshes.add(self)
        except BaseException:
            self._portal.close(hurry=True)
            raise

    def __repr__(self) -> str:
        return repr(self._mesh).replace("AsyncMesh", "Mesh", 1)

    def __enter__(self) -> Mesh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the mesh: others are told, links and sockets closed, the thread ended. Idempotent."""
        if os.getpid() != self._process:
            return
        _meshes.discard(self)
        self._portal.close()

    leave = close

    def rejoin(self, *, min_peers: int | None = None, timeout_s: float | None = None) -> None:
        """Become a member once more, as a new one, and return when there is a view; see :meth:`AsyncMesh.rejoin`.

        Examples
        --------
        >>> import numpy as np, sparkle_mesh as sparkle
        >>> with sparkle.join("my-run", min_peers=1, lan=False) as mesh:
        ...     mesh.rejoin()
        ...     mesh.all_reduce(np.ones(2))
        array([1., 1.])
        """

        async def rejoin() -> None:
            await self._mesh.rejoin(min_peers=min_peers, timeout_s=timeout_s)

        self._call(rejoin)

    @property
    def rank(self) -> int:
        """This process's position in the view, from 0."""
        return self._mesh.rank

    @property
    def size(self) -> int:
        """The number of members of the view."""
        return self._mesh.size

    @property
    def members(self) -> tuple[Member, ...]:
        """The members of the view; a member's position is its rank."""
        return self._mesh.members

    @property
    def view(self) -> View:
        """The agreed view that collectives run over."""
        return self._mesh.view

    @property
    def peer_id(self) -> str:
        """This process's peer id."""
        return self._mesh.peer_id

    @property
    def last_outcome(self) -> Outcome | None:
        """How the last collective ended: contributors, epoch, algorithm, bytes, seconds."""
        return self._mesh.last_outcome

    @property
    def stats(self) -> MeshStats:
        """What the data links carried so far."""
        return self._mesh.stats

    def peers(self) -> list[PeerStatus]:
        """Return all peers of the mesh that are connected now: members, latecomers and nodes."""

        async def peers() -> list[PeerStatus]:
            return self._mesh.peers()

        return self._call(peers)

    def find_devices(
        self,
        kind: str | None = None,
        *,
        min_memory: int | float | str = 0,
        min_gflops: float = 0.0,
        dtype: str = "float32",
        limit: int = 100,
        timeout_s: float = limits.LOOKUP_TIMEOUT_S,
    ) -> list[FoundDevice]:
        """Return the devices of all machines of this mesh that fit; see :meth:`AsyncMesh.find_devices`."""

        async def find_devices() -> list[FoundDevice]:
            return await self._mesh.find_devices(
                kind, min_memory=min_memory, min_gflops=min_gflops, dtype=dtype, limit=limit, timeout_s=timeout_s
            )

        return self._call(find_devices)

    def invite(self) -> str:
        """Return one line of text with which others can join this mesh; it holds the key if there is one."""

        async def invite() -> str:
            return self._mesh.invite()

        return self._call(invite)

    def synchronize(
        self,
        state: object = None,
        step: int = 0,
        *,
        on_drift: str = "repair",
        check: bool = False,
        timeout_s: float = limits.COLLECTIVE_TIMEOUT_S,
        on_progress: Callable[[float], object] | None = None,
    ) -> Synchronized:
        """Bring all members to one state at a step boundary, and take in newcomers; see :meth:`AsyncMesh.synchronize`.

        ``on_progress`` is called in this thread now and then, with how much of what this member lacks has come, from 0
        to 1.

        Examples
        --------
        >>> import numpy as np, sparkle_mesh as sparkle
        >>> with sparkle.join("my-run", min_peers=1, lan=False) as mesh:
        ...     weights, step = np.zeros(3), 0
        ...     while step < 2:
        ...         step = mesh.synchronize({"weights": weights}, step).step
        ...         weights += mesh.all_reduce(np.ones(3), op="mean")
        ...         step += 1
        ...     weights
        array([2., 2., 2.])
        """

        async def synchronize() -> Synchronized:
            return await self._mesh.synchronize(state, step, on_drift=on_drift, check=check, timeout_s=timeout_s)

        return self._call(synchronize, on_progress, lambda: self._mesh._synchronizer.progress)

    def allocate(self, shape: int | Sequence[int], dtype: DTypeLike = "float32") -> np.ndarray[Any, np.dtype[Any]]:
        """Return a new array of zeros that ranks of this host reduce where it lies; see :meth:`AsyncMesh.allocate`."""
        self._mesh._check_process()
        return self._mesh.allocate(shape, dtype)


def join(
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
) -> Mesh:
    """Join a mesh and return once ``min_peers`` processes agree on a view.

    Parameters
    ----------
    name, key, public
        The mesh's name, the same in all processes, or an invite, which holds name and key. The key is a
        :class:`~sparkle_mesh.MeshKey`, its 32 bytes, or the text of a key file: only processes that prove it are
        admitted, and the name is hidden; without one this host and its LAN are, and all others if ``public``.
    min_peers, timeout_s
        The smallest acceptable view, this process included; and for how many seconds to wait for it.
    join, listen
        Invites, or addresses such as ``/ip4/192.168.1.4/tcp/45654/p2p/12D3Koo…``; none are needed on one host or LAN.
        Multiaddrs to listen on; any free port on all interfaces by default.
    data_dir, lan
        Where things are kept (by default ``$SPARKLE_DATA_DIR``, else the platform's user data folder); and whether
        to look for peers on the local networks by multicast.
    bootstrap
        Public peers to meet through: addresses, or ``/dnsaddr/<domain>``; ``[]`` for none. For a mesh with a key or a
        public one by default those in ``$SPARKLE_BOOTSTRAP``, else libp2p's.
    links
        The kinds of data links, best first: of ``"shared_memory"``, ``"tcp"``, ``"libp2p_stream"``; all if None.
    on_quorum_loss
        When too few members are left to decide, calls raise QuorumLostError; with ``"continue"`` this process then goes
        on in a fork: call ``synchronize`` next. Of two that meet again, one ends with MeshMergedError.
    max_silence_s
        How long a member may be silent at most (it is learned from how often it is heard); 30 s if None.
    allow
        Peer ids of machines (``sparkle-node id``): only these and the processes that they have certified are admitted,
        and those of this machine; everybody if None. Give all members the same list.

    Raises
    ------
    UsageError
        If an argument cannot be.
    JoinTimeoutError, QuorumLostError
        If no view formed in time (it says who was found and who was refused), or its members died at once.

    Examples
    --------
    >>> import numpy as np, sparkle_mesh as sparkle
    >>> with sparkle.join("my-run", min_peers=1, lan=False) as mesh:
    ...     mesh.all_reduce(np.ones(3))
    array([1., 1., 1.])
    """
    return Mesh(
        open_mesh(
            name,
            key=key,
            public=public,
            min_peers=min_peers,
            timeout_s=timeout_s,
            join=join,
            listen=listen,
            data_dir=data_dir,
            lan=lan,
            bootstrap=bootstrap,
            links=links,
            on_quorum_loss=on_quorum_loss,
            max_silence_s=max_silence_s,
            allow=allow,
        ),
        name if not is_invite(name) else "invite",
    )


def _close_at_exit() -> None:
    for mesh in list(_meshes):
        mesh.close()


atexit.register(_close_at_exit)
