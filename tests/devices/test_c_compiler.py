"""Functions in C are compiled in the background, once; what cannot be is told, and does without."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
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
    monkeypatch.setattr(c_compiler, "_run", lambda *arguments: (gate.wait(10), run(*arguments))[1])
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


def hanging(folder: Path) -> tuple[str, ...]:
    """Return a compiler that starts another process, and waits for it; ``begun`` has the ids of both."""
    program = (
        "import os, subprocess, sys; child = subprocess.Popen(['sleep', '60']);"
        f"open({str(folder / 'begun~')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}');"
        f"os.rename({str(folder / 'begun~')!r}, {str(folder / 'begun')!r}); child.wait()"
    )
    return (sys.executable, "-c", program)


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_there(process_id: int) -> bool:
    return psutil.pid_exists(process_id) and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE


def test_closing_ends_the_compiler_and_what_it_started(nothing_loaded: Path, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("hanging")
    compiler = CCompiler(hanging(folder))
    for name in ("first", "second"):
        compiler.function(name, TEXT.format(name=name), is_wanted=True)
    wait_for((folder / "begun").exists)
    started = time.monotonic()
    compiler.close()
    assert time.monotonic() - started < 5
    ids = list(map(int, (folder / "begun").read_text().split()))
    wait_for(lambda: not any(map(is_there, ids)))
    assert c_compiler._LOADED.functions == {}
    assert list(nothing_loaded.iterdir()) == []
    # It was not the function's fault: another may try.
    assert not compiler.is_settled("first")


def test_the_programs_end_does_not_wait_for_a_compiler(tmp_path: Path) -> None:
    program = (
        "from sparkle_mesh.devices.c_compiler import CCompiler; import os, time;"
        f"c = CCompiler({hanging(tmp_path)!r}); c.function('x', '', is_wanted=True)\n"
        f"while not os.path.exists({str(tmp_path / 'begun')!r}): time.sleep(0.01)"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], timeout=40, check=True, env=env)
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_a_compiler_that_says_much_is_heard_in_part(caplog: pytest.LogCaptureFixture) -> None:
    program = "import os\nfor _ in range(2000): os.write(2, b'x' * 65536)\nraise SystemExit(1)"
    before = psutil.Process().memory_info().rss
    with caplog.at_level(logging.INFO):
        assert compiled(CCompiler((sys.executable, "-c", program)), "noisy") is None
    assert caplog.text.count("x" * limits.COMPILER_OUTPUT_MAX_CHARS) == 1
    assert psutil.Process().memory_info().rss - before < 50e6


@needs_one
def test_a_library_without_the_function_is_told_and_others_are_compiled(caplog: pytest.LogCaptureFixture) -> None:
    compiler = CCompiler()
    with caplog.at_level(logging.INFO):
        assert compiled(compiler, "absent", TEXT.format(name="another")) is None
    assert "undefined symbol" in caplog.text
    assert called(compiled(compiler, "present")) == 4321


def test_where_no_thread_can_start_numpy_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    compiler = CCompiler(("cc",))
    assert compiler.function("x", "", is_wanted=True) is None
    compiler.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which Windows lacks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_that_ends_leaves_the_parents_folder(nothing_loaded: Path, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("hanging")
    compiler = CCompiler(hanging(folder))
    compiler.function("x", "", is_wanted=True)
    wait_for((folder / "begun").exists)
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert len(list(nothing_loaded.iterdir())) == 1
    compiler.close()


@needs_one
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which Windows lacks")
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
