"""Reading what a process prints, with a deadline."""

from __future__ import annotations

import subprocess
import threading


def read_lines(process: subprocess.Popen[str], *, until: str, timeout_s: float) -> list[str]:
    """Return the lines that ``process`` prints up to the first that contains ``until``; fails without one in time."""
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if until in line:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout_s)
    alive = reader.is_alive()
    if alive:
        process.kill()
        reader.join(5)
    assert not alive, f"no {until!r} within {timeout_s} s in: {''.join(lines)}"
    assert any(until in line for line in lines), f"no {until!r} in: {''.join(lines)}"
    return lines
