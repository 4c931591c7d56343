"""The package built and installed in every way, without the network and without touching the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What is not part of the sources: the repository's own and what tools leave.
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".coverage*", ".hypothesis", "build", "dist", "*.egg-info", "__pycache__"
)
BUILD_TIMEOUT_S = 50.0


def run(arguments: Sequence[str | os.PathLike[str]], cwd: Path) -> str:
    """Run a command without the coverage measurement of this process; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(
        list(map(os.fspath, arguments)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, arguments))} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip_install(target: Path, *arguments: str | os.PathLike[str]) -> Path:
    """Install into ``target`` alone, with what is installed here to build with; return ``target``."""
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--no-compile"]
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", target, *arguments], cwd=target.parent
    )
    return target


@dataclass(frozen=True)
class Interpreter:
    """Fresh interpreters that see ``site`` and the dependencies, and not the clone that is tested."""

    site: Path

    def run(self, cwd: Path, code: str) -> str:
        """Run ``code``, with ``cwd`` in front of the path as ``python -c`` and ``python -m`` have it."""
        # -S leaves the environment's .pth files alone, of which one maps this clone; then its packages are put back.
        prelude = (
            f"import site, sys; site.addsitedir({str(self.site)!r}); sys.path.append({sysconfig.get_path('purelib')!r})"
        )
        return run([sys.executable, "-S", "-c", f"{prelude}\n{code}"], cwd)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the clone's root."""
    return ROOT


@pytest.fixture(scope="session")
def copy_sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Return a function that copies the clone's sources to a new folder."""

    def copy() -> Path:
        folder = tmp_path_factory.mktemp("sources") / "clone"
        return shutil.copytree(ROOT, folder, ignore=IGNORED)

    return copy


@pytest.fixture(scope="session")
def distributions(copy_sources: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a wheel and an sdist."""
    sources, folder = copy_sources(), tmp_path_factory.mktemp("dist")
    for build in ("build_wheel", "build_sdist"):
        code = f"import sys; from setuptools import build_meta; build_meta.{build}(sys.argv[1])"
        run([sys.executable, "-W", "ignore", "-c", code, folder], cwd=sources)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="session")
def wheel(distributions: tuple[Path, Path]) -> Path:
    """Return the wheel's path."""
    return distributions[0]


@pytest.fixture(scope="session")
def sdist(distributions: tuple[Path, Path]) -> Path:
    """Return the sdist's path."""
    return distributions[1]


@pytest.fixture(scope="session")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """Return an interpreter with the wheel installed."""
    return Interpreter(pip_install(tmp_path_factory.mktemp("wheel") / "site", wheel))


@pytest.fixture(scope="session")
def from_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """Return an interpreter with the sdist built and installed."""
    return Interpreter(pip_install(tmp_path_factory.mktemp("sdist") / "site", sdist))


@dataclass(frozen=True)
class Editable:
    """An editable install of a copy of the clone."""

    clone: Path
    python: Interpreter


@pytest.fixture(scope="session")
def editable(copy_sources: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory) -> Editable:
    """Return an editable install, as ``make setup`` makes it, of a copy of the clone."""
    clone = copy_sources()
    return Editable(clone, Interpreter(pip_install(tmp_path_factory.mktemp("editable") / "site", "--editable", clone)))


@pytest.fixture(scope="session")
def make_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Path, Path]]:
    """Return a function that makes an environment with the wheel in it, and returns its Python and its packages."""

    def make() -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("environment") / "venv"
        run([sys.executable, "-m", "venv", "--without-pip", folder], cwd=folder.parent)
        python = folder / "bin" / "python"
        packages = Path(
            run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).strip()
        )
        pip_install(packages, "--upgrade", wheel)
        # The dependencies come from here.
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return python, packages

    return make
