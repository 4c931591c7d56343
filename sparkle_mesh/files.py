"""Small files that only their owner reads, replaced whole."""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

from sparkle_mesh.clock import Entropy

logger = logging.getLogger(__name__)


def make_private_folder(path: Path) -> None:
    """Make ``path`` a folder that only its owner opens, whatever it was before.

    Raises
    ------
    OSError
        If that is not possible.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(path.stat().st_mode) != 0o700:
        path.chmod(0o700)


def write_private(path: Path, data: bytes, entropy: Entropy) -> None:
    """Replace ``path`` by a file of mode 0600 that holds ``data``; a reader sees the old or the new, never a part.

    Raises
    ------
    OSError
        If it could not be written; ``path`` is as it was then.
    """
    temporary = path.with_name(f".{path.name}.{entropy.token(6).hex()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        temporary.replace(path)
    except OSError:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Return what the regular file ``path`` (no symlink) holds, but at most ``max_bytes`` + 1 bytes of it.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    # Non-blocking, so that a named pipe put there holds nothing up.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(f"{path} is not a regular file")
        return stream.read(max_bytes + 1)


def set_aside(path: Path, reason: str) -> None:
    """Move a file that cannot be used out of the way, and tell why. Logs instead of raising."""
    aside = path.with_suffix(".damaged")
    logger.warning("%s is damaged (%s); moved to %s", path, reason, aside.name)
    try:
        path.replace(aside)
    except OSError as problem:
        logger.warning("%s cannot be moved: %s; going on without", path, problem)
