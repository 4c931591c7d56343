"""A member's address changes while it computes: on an emulated network, by the real kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
EMULATOR = HERE.parents[1] / "benchmarks" / "wan_emulator.py"
SILENCE_S = 4.0

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and /dev/net/tun"
)


@pytest.mark.timeout(120)
def test_of_two_that_an_address_change_has_cut_off_one_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, str(EMULATOR), "--hosts", "2", "--", sys.executable, str(HERE / "moving_host.py")]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    said = [line.split() for line in done.stdout.splitlines()]
    assert {words[0] for words in said} == {"alone", "stopped"}, done.stdout + done.stderr
    for _, seconds, first, last in said:
        # Within the deadline, and some for a busy machine; not before it either, as long as it may yet come back.
        assert SILENCE_S * 0.8 < float(seconds) < SILENCE_S * 3
        assert (first, last) == ("2", "2")
