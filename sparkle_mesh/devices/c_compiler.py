"""Functions in C for this machine's processors: compiled in the background by the compiler that is there, if one is.

Whoever wants a function goes on without it until it is there. A process compiles each text once, in a folder of its own
that is gone when the function is loaded; nothing is kept from process to process. No text comes from elsewhere: peers
send graphs, and what is written of these is written here.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakSet

from sparkle_mesh import limits
from sparkle_mesh.clock import SYSTEM_CLOCK
from sparkle_mesh.environment import c_compiler

_LOG = logging.getLogger(__name__)

#: Takes an array of pointers, and four numbers.
Function: TypeAlias = Callable[[Any, int, int, int, int], None]

# As NumPy computes: each operation is rounded by itself, and integers wrap around.
_OPTIONS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fwrapv", "-shared", "-fPIC", "-w")
# Where the compiler knows it: all instructions that this machine has.
_THIS_MACHINE = ("-march=native",)


class _Loaded:
    """What this process has compiled, by name; None for what could not be. The lock is for compilers' queues, too."""

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
        self._wanted: dict[str, str] = {}
        self._thread: threading.Thread | None = None
        self._is_closing = threading.Event()
        _ALL.add(self)

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
                    self._start()
        return None

    def _start(self) -> None:
        # At the program's end it is told to end, and waited for: see _close_all.
        thread = threading.Thread(target=self._work, name="sparkle-compile", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # The interpreter is ending, or can start no thread more: NumPy does all of it.
            self._wanted.clear()
            return
        self._thread = thread

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
        """Compile no more, not even what is being compiled. A later call of :meth:`function` begins anew."""
        with _LOADED.lock:
            self._wanted.clear()
            thread = self._thread
        if thread is not None:
            self._is_closing.set()
            thread.join()
            self._is_closing.clear()

    def forget(self) -> None:
        """In a forked child, which has none of its parent's threads: begin anew when needed."""
        self._wanted, self._thread, self._is_closing = {}, None, threading.Event()

    def _work(self) -> None:
        try:
            while (function := self._next()) is not None:
                name, text = function
                found = _compiled(self._command, name, text, self._is_closing)
                with _LOADED.lock:
                    if not self._is_closing.is_set() or found is not None:
                        _LOADED.functions[name] = found
                    self._wanted.pop(name, None)
        finally:
            with _LOADED.lock:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _next(self) -> tuple[str, str] | None:
        with _LOADED.lock:
            if self._wanted and not self._is_closing.is_set():
                return next(iter(self._wanted.items()))
            # Whoever wants one from now on starts another thread.
            self._thread = None
            return None


def _compiled(command: Sequence[str], name: str, text: str, is_closing: threading.Event) -> Function | None:
    folder = None
    try:
        # Not a TemporaryDirectory, which a forked child would remove at its own end.
        folder = Path(tempfile.mkdtemp(prefix="sparkle-kernel-"))
        source, library = folder / "kernel.c", folder / "kernel.so"
        source.write_text(text)
        said = ""
        for more in (_THIS_MACHINE, ()):
            said, is_over = _run([*command, *_OPTIONS, *more, "-o", str(library), str(source), "-lm"], is_closing)
            if is_over and library.exists():
                return _load(library, name)
            if not is_over:
                break
    except (OSError, AttributeError) as error:
        # No room, no such command, no library, or one without the function.
        said = str(error)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    if not is_closing.is_set():
        _LOG.info("%s is computed by NumPy, because %s cannot compile it: %s", name, command[0], said)
    return None


def _run(command: Sequence[str], is_closing: threading.Event) -> tuple[str, bool]:
    """Run the compiler; return the beginning of what it says, and whether it came to its end by itself."""
    said = b""
    until = SYSTEM_CLOCK.now() + limits.C_COMPILE_TIMEOUT_S
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stderr is not None
        try:
            while SYSTEM_CLOCK.now() < until and not is_closing.is_set():
                if not select.select([process.stderr], [], [], limits.C_COMPILER_LOOK_S)[0]:
                    continue
                some = os.read(process.stderr.fileno(), limits.COMPILER_OUTPUT_MAX_CHARS)
                said = (said + some)[: limits.COMPILER_OUTPUT_MAX_CHARS]
                if not some:
                    process.wait(max(until - SYSTEM_CLOCK.now(), 0.0))
                    return said.decode(errors="replace"), True
        except subprocess.TimeoutExpired:
            # It has closed what it says things on, and goes on.
            pass
        finally:
            _end(process)
    return f"it took more than {limits.C_COMPILE_TIMEOUT_S:g} s", False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the compiler, and what it has started: first so that it removes its own temporary files."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limits.C_COMPILER_END_S)
        os.killpg(process.pid, signal.SIGKILL)


def _load(library: Path, name: str) -> Function:
    function = getattr(ctypes.CDLL(str(library)), name)
    function.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4]
    function.restype = None
    found: Function = function
    return found


def _close_all() -> None:
    for compiler in list(_ALL):
        compiler.close()


def _forget() -> None:
    """In a forked child: whoever held the lock may not be there; what is loaded stays."""
    _LOADED.lock = threading.Lock()
    for compiler in _ALL:
        compiler.forget()


_ALL: WeakSet[CCompiler] = WeakSet()
atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
