"""Functions in C for this machine's processors: compiled in the background by the compiler that is there, if one is.

Whoever wants a function goes on without it until it is there. A process compiles each text once, in a folder of its own
that is gone when the function is loaded; nothing is kept from process to process. No text comes from elsewhere: peers
send graphs, and what is written of these is written here.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from sparkle_mesh import limits
from sparkle_mesh.environment import c_compiler

_LOG = logging.getLogger(__name__)

#: Takes an array of pointers, and four numbers.
Function: TypeAlias = Callable[[Any, int, int, int, int], None]

# As NumPy computes: each operation is rounded by itself, and integers wrap around.
_OPTIONS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fwrapv", "-shared", "-fPIC", "-w")
# Where the compiler knows it: all instructions that this machine has.
_THIS_MACHINE = ("-march=native",)


class _Loaded:
    """What this process has compiled, by name; None for what could not be."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.functions: dict[str, Function | None] = {}


_LOADED = _Loaded()


class CCompiler:
    """Compiles in a thread of its own, which ends when nothing is left to compile.

    Parameters
    ----------
    command
        Of the compiler; by default what :func:`sparkle_mesh.environment.c_compiler` finds. An empty one compiles
        nothing.
    """

    def __init__(self, command: Sequence[str] | None = None) -> None:
        self._command = tuple(c_compiler() or () if command is None else command)
        self._wanted: OrderedDict[str, str] = OrderedDict()
        self._thread: threading.Thread | None = None

    def function(self, name: str, text: str, *, is_wanted: bool) -> Function | None:
        """Return the function ``name`` that ``text`` defines, or None: it is not there yet, or will not be.

        Parameters
        ----------
        is_wanted
            Whether to compile it if it is not there: it may be there at a later call.
        """
        with _LOADED.lock:
            if name in _LOADED.functions:
                return _LOADED.functions[name]
            room = min(limits.C_FUNCTIONS_MAX_COUNT - len(_LOADED.functions), limits.C_FUNCTIONS_WANTED_MAX_COUNT)
            if is_wanted and self._command and name not in self._wanted and len(self._wanted) < room:
                self._wanted[name] = text
                if self._thread is None:
                    # Not a daemon: the program's end waits for the compiler, and leaves no folder of its behind.
                    self._thread = threading.Thread(target=self._work, name="sparkle-compile")
                    self._thread.start()
        return None

    def is_settled(self, name: str) -> bool:
        """Whether asking again for ``name`` would give what it gave: it is there, or cannot be."""
        with _LOADED.lock:
            return not self._command or name in _LOADED.functions

    def wait(self) -> None:
        """Return when all that was asked for is there, or could not be compiled."""
        with _LOADED.lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """Compile no more than what is being compiled."""
        with _LOADED.lock:
            self._wanted.clear()
        self.wait()

    def _work(self) -> None:
        while True:
            with _LOADED.lock:
                if not self._wanted:
                    self._thread = None
                    return
                name, text = next(iter(self._wanted.items()))
            function = _compiled(self._command, name, text)
            with _LOADED.lock:
                _LOADED.functions[name] = function
                self._wanted.pop(name, None)


def _compiled(command: Sequence[str], name: str, text: str) -> Function | None:
    try:
        with tempfile.TemporaryDirectory(prefix="sparkle-kernel-") as folder:
            source, library = Path(folder) / "kernel.c", Path(folder) / "kernel.so"
            source.write_text(text)
            said = ""
            for more in (_THIS_MACHINE, ()):
                said = _run([*command, *_OPTIONS, *more, "-o", str(library), str(source), "-lm"])
                if library.exists():
                    return _load(library, name)
    except OSError as error:
        said = str(error)
    _LOG.info("%s is computed by NumPy, because %s cannot compile it: %s", name, command[0], said)
    return None


def _run(command: Sequence[str]) -> str:
    """Run the compiler; return what it says, or why it says nothing."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=limits.C_COMPILE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {limits.C_COMPILE_TIMEOUT_S:g} s"
    return done.stderr.decode(errors="replace")[: limits.COMPILER_OUTPUT_MAX_CHARS]


def _load(library: Path, name: str) -> Function:
    function = getattr(ctypes.CDLL(str(library)), name)
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4]
    function.restype = None
    found: Function = function
    return found


def _forget() -> None:
    """In a forked child: whoever held the lock may not be there; what is loaded stays."""
    functions = _LOADED.functions
    _LOADED.__init__()  # type: ignore[misc]
    _LOADED.functions = functions


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
