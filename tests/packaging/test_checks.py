"""The programs behind the make targets: that each finds what it is there to find."""

from __future__ import annotations

import importlib.util
import os
import subprocess

import pytest


@pytest.fixture
def load_check(root):
    """Return a function that imports a program of ``.ci/``."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"check_{name}", root / ".ci" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


# --- Set-up ---------------------------------------------------------------------------------------


@pytest.fixture
def check_prerequisites(root):
    """Return a function that checks the prerequisites in an environment with these changes."""

    def check(**environment):
        command = ["sh", str(root / ".ci" / "setup"), "--check"]
        return subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=50, check=False
        )

    return check


@pytest.fixture
def compiler_without(tmp_path):
    """Return a function that makes a compiler which does not find a header."""

    def make(header):
        script = tmp_path / "cc"
        script.write_text(f'#!/bin/sh\ngrep -q "{header}" "$1" && exit 1\nexec cc "$@"\n')
        script.chmod(0o755)
        return str(script)

    return make


def test_this_machine_has_the_prerequisites(check_prerequisites):
    done = check_prerequisites()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_missing_compiler_is_named_with_the_command_that_installs_it(check_prerequisites):
    done = check_prerequisites(CC="/no/such/compiler")
    assert done.returncode == 1
    assert "lacks a C compiler" in done.stderr
    assert "install" in done.stderr


@pytest.mark.parametrize(
    ("header", "named"), [("gmp.h", "the GMP headers (gmp.h)"), ("Python.h", "the headers of Python")]
)
def test_missing_header_is_named(check_prerequisites, compiler_without, header, named):
    done = check_prerequisites(CC=compiler_without(header))
    assert done.returncode == 1
    assert f"lacks {named}" in done.stderr


def test_old_or_missing_python_is_named(check_prerequisites, tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (old, tmp_path / "absent"):
        done = check_prerequisites(PYTHON=str(python))
        assert done.returncode == 1
        assert "no Python 3.11 or newer found" in done.stderr
        assert str(python) in done.stderr


# --- Types ----------------------------------------------------------------------------------------


def test_type_check_that_sees_all_has_no_blind_spots(load_check, tmp_path):
    check = load_check("typecheck")
    check.make_link_tree(tmp_path)
    assert check.blind_spots(tmp_path) == []
    assert not list(tmp_path.rglob(check.PLANTED))


def test_type_check_that_misses_a_mapped_folder_says_so(load_check, tmp_path, monkeypatch):
    check = load_check("typecheck")
    monkeypatch.setattr(
        check,
        "run_mypy",
        lambda tree, arguments: (1, f"transport/{check.PLANTED}:1: error: Incompatible types in assignment"),
    )
    check.make_link_tree(tmp_path)
    blind = check.blind_spots(tmp_path)
    assert f"collectives/{check.PLANTED}" in blind
    assert f"sparkle_mesh/fabric/{check.PLANTED}" in blind
    assert f"transport/{check.PLANTED}" not in blind


def test_type_errors_are_told_by_their_real_paths(load_check):
    check = load_check("typecheck")
    assert check.real_paths("sparkle_mesh/transport/tcp.py:3: error: x\nsparkle_mesh/mesh.py:1: error: y\n") == (
        "transport/tcp.py:3: error: x\nsparkle_mesh/mesh.py:1: error: y\n"
    )


# --- Documentation --------------------------------------------------------------------------------


@pytest.fixture
def documentation_problems(load_check, tmp_path):
    """Return a function that checks a page of its own."""
    (tmp_path / "Makefile").write_text("demo: ## show\n")
    (tmp_path / "other.md").write_text("# Some `heading`, here\n")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "hello.py").touch()

    def check(text):
        (tmp_path / "page.md").write_text(text)
        return [problem.removeprefix(f"{tmp_path}/") for problem in load_check("check_docs").problems(tmp_path)]

    return check


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("see [that](no/such.md)", "page.md:1: no/such.md leads nowhere"),
        ("# A\n\n[that](other.md#missing)", "page.md:3: other.md has no heading for #missing"),
        ("[that](#missing)", "page.md:1: page.md has no heading for #missing"),
        ("```python\nx =\n```", "page.md:2: not Python: invalid syntax"),
        ("```python\n\nfrom sparkle_mesh.errors import Missing\n```", "page.md:3: sparkle_mesh.errors has no Missing"),
        ("```python\nfrom sparkle_mesh.missing import x\n```", "page.md:2: sparkle_mesh.missing has no x"),
        ("```python\nimport sparkle_mesh as s\ns.missing()\n```", "page.md:3: sparkle_mesh has no missing"),
        ("```sh\nmake missing\n```", "page.md:2: make has no target missing"),
        ("```sh\npython examples/missing.py\n```", "page.md:2: examples/missing.py does not exist"),
        ("text\n```python\nx = 1\n", "page.md:2: this block of code does not end"),
    ],
)
def test_documentation_problem_is_found(documentation_problems, text, problem):
    assert documentation_problems(text) == [problem]


def test_good_documentation_passes(documentation_problems):
    page = """# Title

[that](other.md#some-heading-here), [this](#title), [elsewhere](https://example.org/x), `[code](not/a/link)`

```python
import sparkle_mesh
from sparkle_mesh.errors import UsageError

sparkle_mesh.errors
```

```sh
make demo
python examples/hello.py --steps 3
```

```
anything [at](all)
```
"""
    assert documentation_problems(page) == []


def test_make_tells_its_targets(root):
    done = subprocess.run(
        ["make", "--no-print-directory"], cwd=root, capture_output=True, text=True, timeout=30, check=True
    )
    told = [line.split()[1] for line in done.stdout.splitlines()]
    assert {"setup", "demo", "test", "check", "bench", "docs", "clean", "help"} <= set(told)
