"""Started as ``_wan_enter.py DESCRIPTOR PARENT COMMAND…``: becomes COMMAND inside a network namespace.

The command is killed when PARENT, which started this, ends.
"""

from __future__ import annotations

import os
import sys

from _wan_kernel import die_with_parent, enter_namespace


def main() -> None:
    """Enter, and become the command."""
    descriptor, parent, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    die_with_parent(parent)
    enter_namespace(descriptor)
    os.close(descriptor)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
