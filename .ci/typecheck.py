"""Check the types of the library, and prove that the check sees all of it.

``transport/`` and ``collectives/`` are installed as parts of ``sparkle_mesh``, which type checkers cannot know. So a
copy of the tree is made with the folders where the names say, and checked there; messages name the real paths.
Then one type error is planted in each folder of the copy, and the check must find every one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"transport": "sparkle_mesh/transport", "collectives": "sparkle_mesh/collectives"}
# Programs, checked as a user's would be: they see the library through its public names.
PROGRAMS = ("simulations", "examples", "benchmarks")
# py-libp2p brings along trio-typing, whose stubs of an old trio would hide the types that trio itself ships.
INLINE_TYPED = ("trio", "outcome")
INLINE = "inline-typed"
PLANTED = "planted_type_error.py"
IGNORED = shutil.ignore_patterns("__pycache__", ".*")


def make_link_tree(tree: Path) -> None:
    """Copy what is checked to ``tree``, with the mapped folders where their names say."""
    shutil.copytree(ROOT / "sparkle_mesh", tree / "sparkle_mesh", ignore=IGNORED)
    for folder, place in MAPPED.items():
        shutil.copytree(ROOT / folder, tree / place, ignore=IGNORED)
    (tree / INLINE).mkdir()
    for package in INLINE_TYPED:
        specification = importlib.util.find_spec(package)
        assert specification is not None
        assert specification.origin is not None
        (tree / INLINE / package).symlink_to(Path(specification.origin).parent)
    for folder in PROGRAMS:
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, tree / folder, ignore=IGNORED)


def run_mypy(tree: Path, arguments: Sequence[str], search_path: str = "") -> tuple[int, str]:
    """Run mypy in ``tree``; return its exit code and its output with the paths of the real tree."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "link_tree"), "--no-error-summary", *arguments]
    environment = os.environ | {"MYPYPATH": os.pathsep.join(filter(None, (search_path, INLINE)))}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, real_paths(done.stdout + done.stderr)


def real_paths(output: str) -> str:
    """Return mypy's ``output`` with the link tree's paths replaced by those of the clone."""
    for folder, place in MAPPED.items():
        output = re.sub(rf"(?m)^{place}/", f"{folder}/", output)
    return output


def check(tree: Path) -> int:
    """Check the library, then each folder of programs; print what is wrong; return the exit code."""
    library = ["-p", "sparkle_mesh"]
    if (tree / "simulations" / "__init__.py").exists():
        library += ["-p", "simulations"]
    failed, output = run_mypy(tree, library)
    printed = output.splitlines()
    for folder in ("examples", "benchmarks"):
        scripts = sorted(str(path.relative_to(tree)) for path in (tree / folder).glob("*.py"))
        if scripts:
            code, output = run_mypy(tree, scripts, search_path=folder)
            printed += output.splitlines()
            failed |= code
    for project in sorted((tree / "examples").glob("*/pyproject.toml")):
        packages = [f"--package={found.parent.name}" for found in project.parent.glob("*/__init__.py")]
        code, output = run_mypy(tree, packages, search_path=str(project.parent.relative_to(tree)))
        printed += output.splitlines()
        failed |= code
    # What is wrong in the library is told again for each folder that imports it.
    for line in dict.fromkeys(printed):
        print(line)
    return 1 if failed else 0


def blind_spots(tree: Path) -> list[str]:
    """Plant a type error in every package of the library; return the planted files that mypy did not complain of."""
    packages = [path.parent for folder in ("sparkle_mesh", *MAPPED) for path in (ROOT / folder).rglob("__init__.py")]
    expected = [(package / PLANTED).relative_to(ROOT).as_posix() for package in packages]
    planted = [tree / re.sub(r"^\w+", lambda top: MAPPED.get(top[0], top[0]), path) for path in expected]
    for path in planted:
        if path.parent.is_dir():
            path.write_text('number: int = "not a number"\n')
    _, output = run_mypy(tree, ["-p", "sparkle_mesh"])
    for path in planted:
        path.unlink(missing_ok=True)
    return [path for path in expected if f"{path}:1: error: Incompatible types in assignment" not in output]


def main() -> int:
    """Return 0 if the types are right, 1 if not, 2 if the check cannot see something that it should."""
    with tempfile.TemporaryDirectory(prefix="sparkle-types-") as folder:
        tree = Path(folder)
        make_link_tree(tree)
        unseen = blind_spots(tree)
        if unseen:
            print(
                "a type error planted in these files was not found, so nothing there is checked:", *unseen, sep="\n  "
            )
            return 2
        return check(tree)


if __name__ == "__main__":
    sys.exit(main())
