"""One of two hosts of an emulated network (see ``test_address_change.py``): the second one's address changes.

``moving_host.py DATA_DIR`` joins, reduces, and prints how that goes on after the change, and after how many seconds.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import time
from pathlib import Path

import numpy as np

import sparkle_mesh as sparkle
from sparkle_mesh import limits
from sparkle_mesh.errors import QuorumLostError

SIOCSIFADDR = 0x8916
OTHER_ADDRESS = "10.77.0.99"


def move() -> None:
    """Give this host's device another IPv4 address in place of the one it has, as a laptop gets with another Wi-Fi."""
    name, address = os.environ["WAN_DEVICE"].encode(), socket.inet_aton(OTHER_ADDRESS)
    request = struct.pack("16sHH4s8x", name, socket.AF_INET, 0, address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFADDR, request)


def main() -> None:
    """Reduce before and after the change."""
    limits.PING_INTERVAL_S, limits.SUSPICION_FLOOR_S = 0.5, 4.0
    limits.QUORUM_MISSING_S = 0.5
    with sparkle.join("moving", min_peers=2, timeout_s=60, data_dir=Path(sys.argv[1]), lan=False) as mesh:
        array = np.ones(1 << 18, np.float32)
        mesh.all_reduce(array)
        mesh.barrier()
        if os.environ["WAN_HOST"] == "1":
            move()
        started = time.monotonic()
        how = "alone"
        try:
            while mesh.size == 2:
                mesh.all_reduce(array, op="mean")
        except QuorumLostError:
            how = "stopped"
        print(f"{how} {time.monotonic() - started:.1f} {array[0]:g} {array[-1]:g}", flush=True)


if __name__ == "__main__":
    main()
