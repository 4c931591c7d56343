"""What the surroundings decide: where things are kept, which host this is.

The only library file that reads the environment.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import uuid
from hashlib import sha256
from pathlib import Path

import platformdirs

from sparkle_mesh.errors import UsageError

DATA_DIR_VARIABLE = "SPARKLE_DATA_DIR"
BOOTSTRAP_VARIABLE = "SPARKLE_BOOTSTRAP"
COMPILER_VARIABLE = "SPARKLE_CC"
#: The file in the data directory that holds the machine's Ed25519 key.
IDENTITY_NAME = "identity.key"


def resolve_data_dir(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder where everything is kept, created owner-only if it is not there.

    ``data_dir`` wins over the variable ``SPARKLE_DATA_DIR``, which wins over the platform's user data folder.

    Raises
    ------
    UsageError
        If it is no path, cannot be created, is not a folder, belongs to somebody else, or anybody may write to it.
    """
    if data_dir == "":
        raise UsageError("data_dir is empty; name a folder, or leave it out for the default one")
    chosen = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    try:
        path = Path(chosen).expanduser() if chosen else platformdirs.user_data_path("sparkle-mesh", appauthor=False)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise UsageError(
            f"data directory {chosen} cannot be used: {error.strerror}; choose another data directory"
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"data_dir is {chosen!r}, which is no path: {error}") from error
    owner = status.st_uid
    if hasattr(os, "getuid") and owner != os.getuid():
        raise UsageError(
            f"data directory {path} belongs to user id {owner}, not to this one; choose another data directory"
        )
    if os.name == "posix" and status.st_mode & stat.S_IWOTH:
        raise UsageError(f"anybody may write to data directory {path}; run `chmod o-w {path}`, or choose another")
    return path


def bootstrap_peers() -> tuple[str, ...] | None:
    """Return the bootstrap peers that ``SPARKLE_BOOTSTRAP`` lists, separated by commas; None if it is not set.

    ``none`` is an empty list.
    """
    text = os.environ.get(BOOTSTRAP_VARIABLE)
    if text is None:
        return None
    return tuple(item.strip() for item in text.split(",") if item.strip() and item.strip() != "none")


def c_compiler() -> tuple[str, ...] | None:
    """Return the command of the C compiler that kernels on the CPU are compiled with; None if there is none.

    The variable ``SPARKLE_CC`` names it, with options if need be; ``none`` wants none. Else it is the first of cc, gcc
    and clang that can be found.

    Raises
    ------
    UsageError
        If what the variable names cannot be found.
    """
    text = os.environ.get(COMPILER_VARIABLE, "").strip()
    if text == "none" or os.name != "posix":
        return None
    if not text:
        found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        return (found,) if found else None
    try:
        name, *options = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{COMPILER_VARIABLE} is {text!r}, which is no command: {error}") from error
    found = shutil.which(name)
    if found is None:
        raise UsageError(f"{COMPILER_VARIABLE} is {text!r}, and there is no command {name}; name a C compiler, or none")
    return found, *options


def host_id() -> bytes:
    """Return 16 bytes that all processes of this boot of this host share, and no other host has."""
    try:
        seed = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        seed = uuid.getnode().to_bytes(6, "big")
    return sha256(b"sparkle host 1\0" + seed).digest()[:16]


def network_host_id() -> bytes:
    """Return 16 bytes that all processes share that send through the same network devices, and no others.

    Containers of one host have devices of their own.
    """
    try:
        namespace = str(Path("/proc/self/ns/net").readlink()).encode()
    except OSError:
        namespace = b""
    return sha256(b"sparkle network host 1\0" + host_id() + namespace).digest()[:16]
