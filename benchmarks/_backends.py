"""What is measured: one class per library, each an all_reduce over a group of processes on this machine.

A backend is opened in every process of its group with the process's number, the group's size and a folder that
only this group uses, where it may leave what its processes need to meet. To add a peer, write a class and name it
in ``BACKENDS``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

MEET_TIMEOUT_S = 90.0
FITS_SOCKET_BUFFERS_BYTES = 64 * 1024
# The fastest of the sizes from 128 KiB to 4 MiB tried on loopback: fewer wake-ups.
WIRE_PIECE_BYTES = 4 << 20


class Backend(ABC):
    """One library's all_reduce, in one process of a group."""

    #: What its links are, for the rows.
    link: ClassVar[str] = "tcp"
    #: Whether all_reduce really sums, so that results can be verified.
    reduces: ClassVar[bool] = True
    #: The module it needs, and what to do when that is absent.
    needs: ClassVar[tuple[str, str] | None] = None

    rank: int
    size: int

    @abstractmethod
    def __init__(self, number: int, size: int, folder: Path) -> None:
        """Meet the others of the group; ``number`` is this process's, unless the library has ranks of its own."""

    @classmethod
    def how_to_install(cls) -> str | None:
        """Return what to do before this can be measured; None if it can be."""
        if cls.needs is None or importlib.util.find_spec(cls.needs[0]) is not None:
            return None
        return cls.needs[1]

    @classmethod
    def launcher(cls, size: int) -> list[str] | None:
        """Return the command that starts all ``size`` processes at once; None if each is started by itself."""
        return None

    def allocate(self, count: int) -> np.ndarray:
        """Return a float32 array to reduce."""
        return np.empty(count, np.float32)

    @abstractmethod
    def all_reduce(self, array: np.ndarray, algorithm: str, compression: str | None = None) -> None:
        """Sum ``array`` (float32, one dimension) over all ranks, in place; others than ours take no compression."""

    def all_reduce_parts(self, parts: Sequence[np.ndarray]) -> None:
        """Sum several arrays over all ranks, in place, all in flight at the same time where the library can do so."""
        for part in parts:
            self.all_reduce(part, "auto")

    def explain(self, nbytes: int) -> dict[str, Any]:
        """Return what is told of a reduction of ``nbytes``: ``chosen`` and ``predicted_s`` by algorithm."""
        return {}

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all ranks."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group."""


class Sparkle(Backend):
    """This library over encrypted TCP: joined by name alone, the kind of links told."""

    link = "tcp, encrypted"
    links: ClassVar[tuple[str, ...]] = ("tcp",)

    def __init__(self, number: int, size: int, folder: Path) -> None:
        import sparkle_mesh as sparkle

        name = f"benchmark-{folder.name}"
        # Found through the folder's registry alone: no multicast, so that nothing else on the network is measured.
        self._mesh: Any = sparkle.join(
            name, min_peers=size, timeout_s=MEET_TIMEOUT_S, data_dir=folder, lan=False, links=self.links
        )
        self.rank, self.size = self._mesh.rank, self._mesh.size

    def all_reduce(self, array: np.ndarray, algorithm: str, compression: str | None = None) -> None:
        self._mesh.all_reduce(array, algorithm=algorithm, compression=compression)

    def all_reduce_parts(self, parts: Sequence[np.ndarray]) -> None:
        for pending in [self._mesh.all_reduce_async(part) for part in parts]:
            pending.wait()

    def explain(self, nbytes: int) -> dict[str, Any]:
        explanation = self._mesh.explain(nbytes)
        told = {"chosen": explanation.algorithm, "predicted_s": explanation.predicted_s}
        return told | {"lines_bytes_per_s": explanation.lines_bytes_per_s, "shares": explanation.shares}

    def barrier(self) -> None:
        self._mesh.barrier()

    def close(self) -> None:
        self._mesh.close()


class SparkleShared(Sparkle):
    """This library as a user of one host has it: over shared memory, ordinary arrays."""

    link = "shared memory"
    links = ("shared_memory", "tcp")


class SparkleAllocated(SparkleShared):
    """The same, with arrays of ``mesh.allocate``."""

    link = "shared memory, allocated"

    def allocate(self, count: int) -> np.ndarray:
        array: np.ndarray = self._mesh.allocate(count)
        return array


class OpenMpi(Backend):
    """OpenMPI as it comes, which is over shared memory on one host."""

    link = "shared memory"
    needs = (
        "mpi4py",
        "install OpenMPI (`apt-get install openmpi-bin libopenmpi-dev`) and mpi4py (`pip install mpi4py`)",
    )

    def __init__(self, number: int, size: int, folder: Path) -> None:
        from mpi4py import MPI

        self._mpi, self._ranks = MPI, MPI.COMM_WORLD
        self.rank, self.size = self._ranks.Get_rank(), self._ranks.Get_size()

    @classmethod
    def how_to_install(cls) -> str | None:
        return super().how_to_install() or (None if shutil.which("mpirun") else cls.needs and cls.needs[1])

    @classmethod
    def launcher(cls, size: int) -> list[str]:
        root = ["--allow-run-as-root"] if os.name == "posix" and os.geteuid() == 0 else []
        return ["mpirun", *root, "--oversubscribe", "-n", str(size)]

    def all_reduce(self, array: np.ndarray, algorithm: str, compression: str | None = None) -> None:
        self._ranks.Allreduce(self._mpi.IN_PLACE, array)

    def barrier(self) -> None:
        self._ranks.Barrier()

    def close(self) -> None:
        self._mpi.Finalize()


class Gloo(Backend):
    """PyTorch's gloo over TCP, plaintext; on the loopback interface, unless on an emulated host."""

    link = "tcp, plaintext"
    needs = ("torch", "gloo comes with PyTorch: `pip install torch`, or `pip install -e '.[bench]'` in the clone")

    def __init__(self, number: int, size: int, folder: Path) -> None:
        loopback = "lo" if sys.platform == "linux" else "lo0"
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("WAN_DEVICE", loopback)
        import torch
        import torch.distributed as distributed

        self._torch, self._distributed = torch, distributed
        meeting_point = f"file://{folder.resolve()}/gloo"
        distributed.init_process_group("gloo", init_method=meeting_point, rank=number, world_size=size)
        self.rank, self.size = number, size

    def all_reduce(self, array: np.ndarray, algorithm: str, compression: str | None = None) -> None:
        self._distributed.all_reduce(self._torch.from_numpy(array))  # shares the array's memory

    def all_reduce_parts(self, parts: Sequence[np.ndarray]) -> None:
        tensors = [self._torch.from_numpy(part) for part in parts]
        for work in [self._distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()

    def barrier(self) -> None:
        self._distributed.barrier()

    def close(self) -> None:
        self._distributed.destroy_process_group()


class Wire(Backend):
    """The limit: the bytes that a ring moves, over plain TCP, without reducing anything.

    Every rank sends ``2 (n - 1) / n`` of the array's bytes to the next and receives as many from the one before, all
    at once and in large pieces, as an all_reduce over a ring would if it were free of everything else.
    """

    link = "tcp, plaintext"
    reduces = False
    #: TCP's congestion control, if it is not to be the system's.
    congestion: ClassVar[str | None] = None

    def __init__(self, number: int, size: int, folder: Path) -> None:
        self.rank, self.size = number, size
        address = os.environ.get("WAN_ADDRESS", "127.0.0.1")
        listener = socket.create_server((address, 0))
        listener.settimeout(MEET_TIMEOUT_S)
        written = folder / f"port-{number}.new"
        written.write_text(f"{address} {listener.getsockname()[1]}")
        written.rename(folder / f"port-{number}")
        following = folder / f"port-{(number + 1) % size}"
        deadline = time.monotonic() + MEET_TIMEOUT_S
        while not following.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {(number + 1) % size} did not start within {MEET_TIMEOUT_S:.0f} s")
            time.sleep(0.01)
        next_address, port = following.read_text().split()
        self._next = socket.create_connection((next_address, int(port)), timeout=MEET_TIMEOUT_S)
        self._previous, _ = listener.accept()
        listener.close()
        for connection in (self._next, self._previous):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.congestion is not None:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self.congestion.encode())
            connection.settimeout(MEET_TIMEOUT_S)
        self._scratch = memoryview(bytearray(WIRE_PIECE_BYTES))

    def _receive(self, count: int) -> None:
        while count:
            received = self._previous.recv_into(self._scratch[: min(count, len(self._scratch))], 0, socket.MSG_WAITALL)
            if not received:
                raise ConnectionError("the rank before this one closed its connection")
            count -= received

    def all_reduce(self, array: np.ndarray, algorithm: str, compression: str | None = None) -> None:
        count = 2 * (self.size - 1) * array.nbytes // self.size
        payload = array.view(np.uint8).data
        if count <= FITS_SOCKET_BUFFERS_BYTES:
            self._next.sendall(payload[: count // 2])
            self._next.sendall(payload[: count - count // 2])
            self._receive(count)
            return

        def send() -> None:
            left = count
            while left:
                piece = min(left, len(payload), WIRE_PIECE_BYTES)
                self._next.sendall(payload[:piece])
                left -= piece

        sender = threading.Thread(target=send)
        sender.start()
        self._receive(count)
        sender.join()

    def barrier(self) -> None:
        for _ in range(2):  # once around to know that all are here, once more to tell them
            if self.rank:
                self._receive(1)
                self._next.sendall(b"\0")
            else:
                self._next.sendall(b"\0")
                self._receive(1)

    def close(self) -> None:
        self._next.close()
        self._previous.close()


class WireBbr(Wire):
    """The same with the congestion control BBR, which takes a loss for a loss and not for a full queue."""

    congestion = "bbr"


BACKENDS: dict[str, type[Backend]] = {
    "sparkle": Sparkle,
    "sparkle_shared": SparkleShared,
    "sparkle_allocated": SparkleAllocated,
    "gloo": Gloo,
    "openmpi": OpenMpi,
    "wire": Wire,
    "wire-bbr": WireBbr,
}
PEERS = ("gloo", "openmpi", "wire")
#: Ours, by the links that they use.
OURS = {"tcp": "sparkle", "shared": "sparkle_shared", "allocated": "sparkle_allocated"}
#: Ours.
ALGORITHMS = ("auto", "ring", "tree", "direct", "halving_doubling", "butterfly")
COMPRESSIONS = ("auto", "float16", "bfloat16", "int8", "int4")
