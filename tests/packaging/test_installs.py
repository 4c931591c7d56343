"""One set of modules, however and from wherever it is installed and imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("packaging")

# Prints where these packages and the modules in them are imported from.
WHERE = """
import importlib, json, pkgutil, sys
import sparkle_mesh
found = {}
for part in ["", ".transport", ".collectives", ".fabric", ".cli"]:
    name = f"sparkle_mesh{part}"
    package = importlib.import_module(name)
    found[name] = package.__file__
    for module in pkgutil.iter_modules(package.__path__, f"{name}."):
        found[module.name] = importlib.util.find_spec(module.name).origin
print(json.dumps(found))
"""
MAPPED = {"sparkle_mesh.transport": "transport", "sparkle_mesh.collectives": "collectives"}
SCRIPT = f"import importlib.util{WHERE}"


def modules_on_disk(root):
    """Return module names of the library and their files, by the folders of the clone."""
    found = {}
    for folder, package in [
        ("sparkle_mesh", "sparkle_mesh"),
        *((folder, package) for package, folder in MAPPED.items()),
    ]:
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join([package, *parts])] = path
    return found


def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_packages_are_those_on_disk(root):
    with_code = {path.parent for folder in ("sparkle_mesh", *MAPPED.values()) for path in (root / folder).rglob("*.py")}
    names = {".".join(path.relative_to(root).parts) for path in with_code}
    names = {f"sparkle_mesh.{name}" if name.split(".")[0] in MAPPED.values() else name for name in names}
    assert set(project(root)["tool"]["setuptools"]["packages"]) == names


def test_every_package_has_an_init(root):
    folders = {path.parent for folder in ("sparkle_mesh", *MAPPED.values()) for path in (root / folder).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("place", ["root", "elsewhere"])
@pytest.mark.parametrize("how", ["-c", "-m", "script"])
def test_installed_clone_is_the_same_from_everywhere(root, tmp_path, place, how):
    (tmp_path / "where_is_it.py").write_text(SCRIPT)
    arguments = {"-c": ["-c", SCRIPT], "-m": ["-m", "where_is_it"], "script": [str(tmp_path / "where_is_it.py")]}[how]
    environment = os.environ | ({"PYTHONPATH": str(tmp_path)} if how == "-m" else {})
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root if place == "root" else tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    found = {name: Path(path) for name, path in json.loads(done.stdout).items()}
    on_disk = modules_on_disk(root)
    assert {name: path for name, path in on_disk.items() if name in found} == found
    assert {"sparkle_mesh.transport.link", "sparkle_mesh.limits", "sparkle_mesh.cli.node"} <= set(found)


def test_bare_names_are_not_importable_from_elsewhere(tmp_path):
    code = (
        "import importlib.util as u; print([n for n in ('transport', 'collectives', 'simulations') if u.find_spec(n)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"


def test_wheel_holds_the_library_and_nothing_else(wheel, root):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sparkle_mesh"}
    assert "sparkle_mesh/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names if name.endswith(".py")
    }
    assert modules == set(modules_on_disk(root))


def test_sdist_holds_what_a_clone_does(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "Makefile", "MANIFEST.in", ".ci/setup", "tests/conftest.py"):
        assert name in names
    assert {
        "transport/link.py",
        "collectives/__init__.py",
        "sparkle_mesh/py.typed",
        "examples/train_digits.py",
    } <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git/", "build/", ".venv/"))]


@pytest.mark.parametrize("kind", ["from_wheel", "from_sdist"])
def test_installed_distribution_is_complete(kind, request, root, tmp_path):
    python = request.getfixturevalue(kind)
    found = json.loads(python.run(tmp_path, SCRIPT))
    assert set(found) == {
        name
        for name in modules_on_disk(root)
        if name.count(".") < 2 or name.split(".")[1] in {"transport", "collectives", "fabric", "cli"}
    }
    assert all(Path(path).is_relative_to(python.site) for path in found.values())
    for name, path in found.items():
        assert Path(path).read_bytes() == modules_on_disk(root)[name].read_bytes()


def test_installed_version_is_the_projects(from_wheel, root, tmp_path):
    printed = from_wheel.run(tmp_path, "import sparkle_mesh; print(sparkle_mesh.__version__)")
    assert printed.strip() == project(root)["project"]["version"]


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_editable_install_sees_files_added_later(editable, tmp_path, place):
    clone, python = editable.clone, editable.python
    cwd = clone if place == "root" else tmp_path
    found = {name: Path(path) for name, path in json.loads(python.run(cwd, SCRIPT)).items()}
    on_disk = modules_on_disk(clone)
    assert found == {name: on_disk[name] for name in found}
    for folder in ("sparkle_mesh", "transport", "collectives"):
        (clone / folder / f"added_{place}.py").write_text(f"HERE = {folder!r}\n")
    code = f"""
from sparkle_mesh import added_{place} as one
from sparkle_mesh.transport import added_{place} as two
from sparkle_mesh.collectives import added_{place} as three
print(one.HERE, two.HERE, three.HERE)
"""
    assert python.run(cwd, code).split() == ["sparkle_mesh", "transport", "collectives"]


def test_simulations_run_from_the_clone(root):
    done = subprocess.run(
        [sys.executable, "-m", "simulations", "--help"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_command_is_installed(from_wheel):
    script = from_wheel.site / "bin" / "sparkle-node"
    assert os.access(script, os.X_OK)
    assert "sparkle_mesh.cli.node" in script.read_text()
