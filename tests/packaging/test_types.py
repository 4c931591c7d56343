"""Programs of users type-check against the installed package, and wrong ones do not."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.xdist_group("packaging")

RIGHT = """
import sparkle_mesh as sparkle
from sparkle_mesh import errors, limits
from sparkle_mesh.transport.link import LinkStats

seconds: float = limits.JOIN_TIMEOUT_S
stats = LinkStats(bytes_sent=3)
try:
    with sparkle.join("my-run", min_peers=stats.bytes_sent, timeout_s=seconds) as mesh:
        rank: int = mesh.rank
except errors.UsageError as error:
    raise SystemExit(str(error)) from error
"""
WRONG = """
import sparkle_mesh as sparkle
from sparkle_mesh import errors, limits
from sparkle_mesh.transport.link import LinkStats

seconds: str = limits.JOIN_TIMEOUT_S
stats = LinkStats(bytes_sent="3")
errors.NoSuchError
with sparkle.join("my-run", min_peers="2") as mesh:
    rank: str = mesh.rank
"""


@pytest.fixture(scope="module")
def environment(make_environment):
    return make_environment()


@pytest.fixture
def check_types(environment, root, tmp_path):
    """Return a function that runs mypy as a user would, and returns the lines that it complains of by file."""
    python, _ = environment

    def check(*names):
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--python-executable", str(python)]
        # A cache that outlives the test: what takes the time is NumPy's and trio's types.
        command += ["--cache-dir", str(root / ".mypy_cache" / "downstream"), *names]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=55, check=False)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return set(re.findall(r"(?m)^([\w.]+:\d+): error", done.stdout)), done.stdout

    return check


def test_right_program_passes_and_wrong_one_fails(check_types, tmp_path):
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    complaints, printed = check_types("right.py", "wrong.py")
    assert complaints == {f"wrong.py:{line}" for line in (6, 7, 8, 9, 10)}, printed


def test_without_the_marker_there_would_be_no_types(check_types, environment, tmp_path):
    _, packages = environment
    marker = packages / "sparkle_mesh" / "py.typed"
    assert marker.exists()
    marker.unlink()
    try:
        (tmp_path / "right.py").write_text(RIGHT)
        complaints, printed = check_types("right.py")
    finally:
        marker.touch()
    assert complaints
    assert "missing library stubs or py.typed marker" in printed
