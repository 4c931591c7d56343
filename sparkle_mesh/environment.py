"""What the surroundings decide: where things are kept, which host this is.

The only library file that reads the environment.
"""

from __future__ import annotations

import os
import uuid
from hashlib import sha256
from pathlib import Path

import platformdirs

from sparkle_mesh.errors import UsageError

DATA_DIR_VARIABLE = "SPARKLE_DATA_DIR"


def resolve_data_dir(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder where everything is kept, created owner-only if it is not there.

    ``data_dir`` wins over the variable ``SPARKLE_DATA_DIR``, which wins over the platform's user data folder.

    Raises
    ------
    UsageError
        If it cannot be created, is not a folder, or belongs to somebody else.
    """
    chosen = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    path = Path(chosen).expanduser() if chosen else platformdirs.user_data_path("sparkle-mesh", appauthor=False)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.stat().st_uid
    except OSError as error:
        raise UsageError(
            f"data directory {path} cannot be used: {error.strerror}; choose another by data_dir"
        ) from error
    if hasattr(os, "getuid") and owner != os.getuid():
        raise UsageError(
            f"data directory {path} belongs to user id {owner}, not to this one; choose another by data_dir"
        )
    return path


def host_id() -> bytes:
    """Return 16 bytes that all processes of this boot of this host share, and no other host has."""
    try:
        seed = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        seed = uuid.getnode().to_bytes(6, "big")
    return sha256(b"sparkle host 1\0" + seed).digest()[:16]
