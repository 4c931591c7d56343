"""At a clone's root its own modules come first on the path: they must be whole without an editable install."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
sys.path[:0] = [{root!r}]
sys.path.append({site_packages!r})
import sparkle_mesh, sparkle_mesh.transport.link, sparkle_mesh.collectives.ring
print(sparkle_mesh.__file__, sparkle_mesh.transport.link.__file__, sparkle_mesh.collectives.ring.__file__, sep="\\n")
"""


def test_a_clone_is_whole_without_any_install() -> None:
    program = PROGRAM.format(root=str(ROOT), site_packages=sysconfig.get_path("purelib"))
    # -S: no site module, so no .pth file and none of the editable install's finders.
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    files = [Path(line) for line in done.stdout.split()]
    assert files == [ROOT / "sparkle_mesh/__init__.py", ROOT / "transport/link.py", ROOT / "collectives/ring.py"]
