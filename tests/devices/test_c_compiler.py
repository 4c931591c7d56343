"""Functions in C are compiled in the background, once; what cannot be is told, and does without."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from sparkle_mesh import environment, limits
from sparkle_mesh.devices import c_compiler
from sparkle_mesh.devices.c_compiler import CCompiler
from sparkle_mesh.errors import UsageError

CC = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
needs_one = pytest.mark.skipif(CC is None, reason="there is no C compiler")
TEXT = """#include <stdint.h>
void {name}(int64_t *to, int64_t a, int64_t b, int64_t c, int64_t d) {{ *to = a + b + c + d; }}
"""


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing is compiled yet, and what is made while compiling is made in an empty folder."""
    monkeypatch.setattr(c_compiler._LOADED, "functions", {})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def compiled(compiler: CCompiler, name: str, text: str | None = None) -> Any:
    text = TEXT.format(name=name) if text is None else text
    first = compiler.function(name, text, is_wanted=True)
    compiler.wait()
    return first or compiler.function(name, text, is_wanted=True)


def called(function: Any) -> int:
    found = ctypes.c_int64()
    function(ctypes.byref(found), 1, 20, 300, 4000)
    return found.value


@needs_one
def test_it_is_there_at_a_later_call_and_leaves_nothing_behind(nothing_loaded: Path) -> None:
    compiler = CCompiler()
    text = TEXT.format(name="later")
    assert compiler.function("later", text, is_wanted=False) is None
    assert compiler._thread is None
    assert not compiler.is_settled("later")
    assert called(compiled(compiler, "later")) == 4321
    assert compiler.is_settled("later")
    assert list(nothing_loaded.iterdir()) == []
    # Another one of this process finds it, without compiling.
    assert called(CCompiler(()).function("later", text, is_wanted=False)) == 4321


@pytest.mark.parametrize("command", [(sys.executable, "-c", "raise SystemExit('no room')"), ("/nowhere/cc",)])
def test_what_cannot_be_compiled_is_told_once(command: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    compiler = CCompiler(command)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert compiled(compiler, "broken") is None
    assert compiler.is_settled("broken")
    (record,) = caplog.records
    assert f"broken is computed by NumPy, because {command[0]} cannot compile it: " in record.getMessage()
    assert ("no room" if "-c" in command else "No such file") in record.getMessage()


@needs_one
def test_text_that_is_no_c_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert compiled(CCompiler(), "wrong", "void wrong(") is None
    assert "error" in caplog.text


def test_a_compiler_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(limits, "C_COMPILE_TIMEOUT_S", 0.2)
    with caplog.at_level(logging.INFO):
        assert compiled(CCompiler((sys.executable, "-c", "while True: pass")), "x") is None
    assert "more than 0.2 s" in caplog.text


@needs_one
def test_a_processor_that_the_compiler_does_not_know_gets_what_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_compiler, "_THIS_MACHINE", ("-march=of-tomorrow",))
    assert called(compiled(CCompiler(), "plain")) == 4321


@needs_one
def test_few_are_wanted_at_a_time_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    run = c_compiler._run
    monkeypatch.setattr(c_compiler, "_run", lambda command: (gate.wait(10), run(command))[1])
    monkeypatch.setattr(limits, "C_FUNCTIONS_WANTED_MAX_COUNT", 2)
    monkeypatch.setattr(limits, "C_FUNCTIONS_MAX_COUNT", 3)
    compiler = CCompiler()
    names = [f"one_{number}" for number in range(5)]
    for name in names:
        compiler.function(name, TEXT.format(name=name), is_wanted=True)
    assert list(compiler._wanted) == names[:2]
    gate.set()
    compiler.wait()
    for name in names[2:]:
        compiled(compiler, name)
    assert list(c_compiler._LOADED.functions) == names[:3]


@needs_one
def test_closing_waits_for_the_one_that_is_being_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gate = threading.Event(), threading.Event()
    run = c_compiler._run

    def slow(command: Any) -> str:
        begun.set()
        gate.wait(10)
        return run(command)

    monkeypatch.setattr(c_compiler, "_run", slow)
    compiler = CCompiler()
    for name in ("first", "second"):
        compiler.function(name, TEXT.format(name=name), is_wanted=True)
    assert begun.wait(10)
    closing = threading.Thread(target=compiler.close)
    closing.start()
    while compiler._wanted:
        pass
    gate.set()
    closing.join(10)
    assert not closing.is_alive()
    assert list(c_compiler._LOADED.functions) == ["first"]


@needs_one
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_what_is_loaded_and_compiles_its_own() -> None:
    compiler = CCompiler()
    assert compiled(compiler, "before") is not None
    with c_compiler._LOADED.lock:
        child = multiprocessing.get_context("fork").Process(target=_in_child)
        child.start()
    child.join(30)
    assert child.exitcode == 0


def _in_child() -> None:
    assert called(compiled(CCompiler(), "before")) == 4321
    assert called(compiled(CCompiler(), "after")) == 4321


# --- Which compiler ----------------------------------------------------------------------------------


def test_the_first_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARKLE_CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in ("gcc", "clang") else None)
    assert environment.c_compiler() == ("/bin/gcc",)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert environment.c_compiler() is None


def test_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name == "ccache" else None)
    monkeypatch.setenv("SPARKLE_CC", "ccache 'my cc' -O1")
    assert environment.c_compiler() == ("/bin/ccache", "my cc", "-O1")
    monkeypatch.setenv("SPARKLE_CC", "none")
    assert environment.c_compiler() is None
    monkeypatch.setenv("SPARKLE_CC", "tcc")
    with pytest.raises(UsageError, match="SPARKLE_CC is 'tcc', and there is no command tcc; name a C comp"):
        environment.c_compiler()
    monkeypatch.setenv("SPARKLE_CC", "cc '")
    with pytest.raises(UsageError, match="which is no command"):
        environment.c_compiler()
