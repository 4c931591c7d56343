"""The entry of ``sparkle-node``: it listens for signals, then loads the rest.

Nothing is imported here that takes time, so that Ctrl-C is heard from the first moment on.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from sparkle_mesh.cli.signals import StopSignals


def main() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    stop = StopSignals()
    stop.listen()
    from sparkle_mesh.cli.commands import run_command_line

    sys.exit(run_command_line(sys.argv[1:], stop))


if __name__ == "__main__":
    main()
