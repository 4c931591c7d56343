"""What every test gets: it fails if it leaves threads, child processes or sockets behind."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

# What was asked to end may still be on its way: as long as this is waited for it, in all.
GRACE_S = 2.0
# trio keeps idle worker threads (under this name; a busy one bears its task's) for the next run, for 10 s.
IDLE_TRIO_WORKER = re.compile(r"Trio thread \d+")
# multiprocessing starts one helper per process, and keeps it.
KEPT_CHILDREN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

# Nothing that a test starts looks for peers beyond this machine, unless the test says which.
os.environ["SPARKLE_BOOTSTRAP"] = "none"

# PoCL keeps what it compiled from run to run; processes that test at the same time each in their own folder.
os.environ.setdefault(
    "POCL_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"sparkle-tests-pocl-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"),
)
Path(os.environ["POCL_CACHE_DIR"]).mkdir(exist_ok=True)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a shell. Tests send this signal, to this process and to children that inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Held:
    """What this process holds: threads, child processes by id, sockets by inode."""

    threads: set[threading.Thread] = field(default_factory=set)
    children: set[int] = field(default_factory=set)
    sockets: set[str] = field(default_factory=set)

    @staticmethod
    def now() -> Held:
        """Look at what is held now."""
        threads = {thread for thread in threading.enumerate() if not IDLE_TRIO_WORKER.fullmatch(thread.name)}
        return Held(threads, set(child_processes()), open_sockets())

    def beyond(self, before: Held) -> Held:
        """Return what is held beyond ``before``."""
        return Held(self.threads - before.threads, self.children - before.children, self.sockets - before.sockets)

    def __bool__(self) -> bool:
        return bool(self.threads or self.children or self.sockets)

    def __str__(self) -> str:
        parts = [f"thread {thread.name}" for thread in self.threads]
        parts += [describe_child(child) for child in self.children]
        parts += [f"socket {inode}" for inode in self.sockets]
        return ", ".join(sorted(parts))


def child_processes() -> list[int]:
    """Return the ids of this process's children, ended ones that nobody has waited for included."""
    # The kernel keeps the list per thread; asking psutil would read every process of the machine.
    lists = list(Path("/proc/self/task").glob("*/children"))
    if not lists:
        return [child.pid for child in psutil.Process().children() if not is_kept(child.pid)]
    found = []
    for path in lists:
        try:
            found += [int(child) for child in path.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # that thread has ended; its children are now another one's
    return [child for child in found if not is_kept(child)]


def is_kept(pid: int) -> bool:
    """Return whether the process is one that multiprocessing keeps."""
    try:
        return any(kept in part for part in psutil.Process(pid).cmdline() for kept in KEPT_CHILDREN)
    except psutil.NoSuchProcess:  # ended, and not waited for
        return False


def describe_child(pid: int) -> str:
    """Return what to call a child in a message."""
    try:
        return f"child {pid} ({' '.join(psutil.Process(pid).cmdline())[:200]})"
    except psutil.NoSuchProcess:
        return f"child {pid} (ended, not waited for)"


def open_sockets() -> set[str]:
    """Return this process's open sockets, by inode (Linux) or address."""
    folder = Path("/proc/self/fd")
    if not folder.exists():
        return {str(connection) for connection in psutil.Process().net_connections(kind="all")}
    found = set()
    for descriptor in folder.iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:
            continue  # the listing's own descriptor
        if target.startswith("socket:"):
            found.add(target)
    return found


def left_behind(before: Held) -> Held:
    """Return what is held beyond ``before``, after collecting garbage and letting threads and children end."""
    left = Held.now().beyond(before)
    if not left:
        return left
    gc.collect()
    for thread in left.threads:
        thread.join(GRACE_S / len(left.threads))
    for child in left.children:
        # Not waited for as a parent would: a child that ended unnoticed is a finding, too.
        try:
            process = psutil.Process(child)
        except psutil.NoSuchProcess:
            continue
        if process.status() != psutil.STATUS_ZOMBIE:
            psutil.wait_procs([process], timeout=GRACE_S / len(left.children))
    return Held.now().beyond(before)


@pytest.fixture(scope="session", autouse=True)
def drivers() -> None:
    """Open the GPUs' driver, if there is one, before any test: it keeps a socket for as long as the process lives."""
    if importlib.util.find_spec("cupy") is None:
        return
    import cupy

    with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
        for index in range(cupy.cuda.runtime.getDeviceCount()):
            with cupy.cuda.Device(index):
                cupy.cuda.runtime.deviceSynchronize()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Do not trace tests that are marked ``untraced``, for coverage or a debugger."""
    if not item.get_closest_marker("untraced"):
        return (yield)
    # Not by coverage's own stop and start: each start patches os._exit once more, and forked children then save that
    # often.
    trace, trace_of_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)  # type: ignore[arg-type]
    try:
        return (yield)
    finally:
        threading.settrace(trace_of_threads)  # type: ignore[arg-type]
        sys.settrace(trace)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves threads, child processes or sockets behind."""
    before = Held.now()
    yield
    left = left_behind(before)
    if left:
        pytest.fail(f"the test left behind: {left}", pytrace=False)
