"""One node per data directory: a lock file with the pid of the node that holds it.

The lock is the kernel's (flock), so a killed node leaves none behind; the file is only where it hangs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparkle_mesh import limits
from sparkle_mesh.errors import NodeRunningError, UsageError

LOCK_NAME = "node.lock"


@contextmanager
def hold_data_dir(data_dir: Path) -> Iterator[None]:
    """Be the node of ``data_dir`` until the block ends.

    Raises
    ------
    NodeRunningError
        If another process is.
    UsageError
        If the directory cannot be written, or its file system has no locks.
    """
    if sys.platform == "win32":  # pragma: no cover (Windows: no flock)
        yield
        return
    path = data_dir / LOCK_NAME
    descriptor = _acquire(path)
    try:
        yield
    finally:
        if _is_at(path, descriptor):
            path.unlink()
        os.close(descriptor)


def running_pid(data_dir: Path) -> int | None:
    """Return the process that wrote the lock file, if there is such a process now.

    The lock itself is not tried: a node that starts at that moment would be turned away by the attempt.
    """
    try:
        text = (data_dir / LOCK_NAME).read_bytes()[: limits.LOCK_FILE_MAX_BYTES]
    except OSError:
        return None
    pid = int(text) if text.strip().isdigit() else 0
    if pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        return pid
    return pid


def _acquire(path: Path) -> int:
    import fcntl

    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise UsageError(
                f"lock file {path} cannot be opened: {error.strerror}; choose another data directory"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(descriptor, limits.LOCK_FILE_MAX_BYTES, 0).strip().decode(errors="replace")
            os.close(descriptor)
            raise NodeRunningError(
                f"a node runs on {path.parent} already ({f'pid {pid}' if pid else 'it is just starting'}); "
                "stop it, or choose another directory with --data-dir"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise UsageError(
                f"{path} cannot be locked: {error.strerror}; choose a data directory on a local disk"
            ) from error
        # The node that held it may have removed the file between our opening and locking it; a lock on a
        # file that nobody else will find excludes nobody.
        if _is_at(path, descriptor):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
