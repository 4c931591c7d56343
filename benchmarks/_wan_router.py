"""The emulator's router, a process of its own: ``_wan_router.py CONTROL PARENT DEVICE…`` (descriptors and a pid).

The first line on the control socket is the configuration; then every line is a command and gets a line of answer. It
ends when the control socket does, and its devices with it.

Of every packet three moments matter: when its host's uplink sends it, when it comes to the other host's downlink, and
when that has delivered its last byte. The first is computed as it is read; the other two are events, in order of time.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from _wan_kernel import die_with_parent, wake_up_on_time
from _wan_link import Loss, Settings
from _wan_packets import MAX_FRAME, Burst, destination, parse

READS_PER_TURN = 32
LATE_S = 0.001


class Host:
    """One host's device, its links and its settings."""

    def __init__(self, device: int, settings: Settings, seed: str) -> None:
        self.device = device
        self.settings = settings
        self.up, self.down = settings.up_queue(), settings.down_queue()
        self.loss = Loss(settings.loss, seed)
        self.connected = True
        self.cut_packets = 0
        self.last_arrival = 0.0

    def change(self, settings: Settings, now: float) -> None:
        """Take on ``settings``; packets on their way are not affected by another delay."""
        self.up.change(settings.up_queue(), now)
        self.down.change(settings.down_queue(), now)
        if settings.loss != self.settings.loss:
            self.loss.set(settings.loss)
        self.settings = settings

    def counters(self) -> dict[str, Any]:
        """Return what happened on this host's links so far."""
        return {
            "sent_bytes": self.up.sent_bytes,
            "received_bytes": self.down.sent_bytes,
            "queue_drops": self.up.dropped_segments + self.down.dropped_segments,
            "up_drops": self.up.dropped_segments,
            "down_drops": self.down.dropped_segments,
            "lost": self.loss.lost_segments,
            "cut": self.cut_packets,
            "longest_queue_bytes": round(max(self.up.longest_bytes, self.down.longest_bytes)),
        }


class Router:
    """Moves packets between the devices of hosts."""

    def __init__(self, hosts: list[Host], routes: dict[bytes, Host]) -> None:
        self.hosts, self.routes = hosts, routes
        self._by_device = {host.device: host for host in hosts}
        # (when, order, burst, to, when its last byte comes or None once it waits for delivery)
        self._events: list[tuple[float, int, Burst, Host, float | None]] = []
        self._order = 0
        self.reset()

    def reset(self) -> None:
        """Begin to count the router's own effort anew."""
        self.packets = self.late_packets = self.rejected = 0
        self.latest_s = 0.0
        self._since, self._cpu_since = time.monotonic(), time.process_time()

    def effort(self) -> dict[str, Any]:
        """Return how busy and how late the router was since the last reset."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        return {
            "seconds": elapsed,
            "cpu_share": (time.process_time() - self._cpu_since) / elapsed,
            "packets": self.packets,
            "late_packets": self.late_packets,
            "latest_s": self.latest_s,
            "rejected": self.rejected,
        }

    def run(self, control: int) -> None:
        """Move packets until ``control`` can be read."""
        devices = [*self._by_device, control]
        clock = time.monotonic
        while True:
            self._handle_events()
            timeout = max(0.0, self._events[0][0] - clock()) if self._events else None
            readable, _, _ = select.select(devices, [], [], timeout)
            for device in readable:
                if device == control:
                    return
                self._read(self._by_device[device])

    def _schedule(self, when: float, burst: Burst, to: Host, last_at: float | None) -> None:
        self._order += 1
        heapq.heappush(self._events, (when, self._order, burst, to, last_at))

    def _read(self, host: Host) -> None:
        now = time.monotonic()
        read, device = os.read, host.device
        for _ in range(READS_PER_TURN):
            try:
                data = read(device, MAX_FRAME)
            except BlockingIOError:
                return
            to = self.routes.get(destination(data))
            if to is not None and to is not host:  # the rest is multicast of the kernel's own
                self._send(host, to, parse(data), now)

    def _send(self, host: Host, to: Host, burst: Burst, now: float) -> None:
        if not host.connected:
            host.cut_packets += 1
            return
        admitted = host.up.admit(burst, now)
        if admitted is None:
            return
        begins, _ = host.up.send(admitted, now, now)
        per_byte, segment = host.up.seconds_per_byte, admitted.segment
        for start, stop in host.loss.passing(admitted.segments):
            piece = admitted.part(start, stop)
            # A delay that was shortened does not let packets overtake each other.
            first = max(
                begins + (start * segment + piece.wire_bytes / piece.segments) * per_byte + host.settings.delay_s,
                host.last_arrival,
            )
            last = max(begins + (start * segment + piece.wire_bytes) * per_byte + host.settings.delay_s, first)
            host.last_arrival = first
            self._schedule(first, piece, to, last)

    def _handle_events(self) -> None:
        events, clock, pop = self._events, time.monotonic, heapq.heappop
        turn = 0
        while events and events[0][0] <= clock() and turn < READS_PER_TURN:
            turn += 1
            when, _, burst, to, last_at = pop(events)
            if not to.connected:
                to.cut_packets += 1
            elif last_at is None:
                self._deliver(burst, to, clock() - when)
            elif (admitted := to.down.admit(burst, when)) is not None:
                _, ends = to.down.send(admitted, when, last_at)
                self._schedule(ends, admitted, to, None)

    def _deliver(self, burst: Burst, to: Host, late_s: float) -> None:
        try:
            os.write(to.device, burst.data)
        except OSError:  # the host took its device down, or its kernel has no memory for the packet: it is lost
            self.rejected += 1
        self.packets += 1
        if late_s > self.latest_s:
            self.latest_s = late_s
        if late_s > LATE_S:
            self.late_packets += 1


def obey(router: Router, command: dict[str, Any]) -> dict[str, Any]:
    """Carry out one command; return the answer."""
    what = command["what"]
    if what == "change":
        router.hosts[command["host"]].change(Settings(**command["settings"]), time.monotonic())
    elif what == "connect":
        router.hosts[command["host"]].connected = command["connected"]
    elif what == "reset":
        router.reset()
    elif what == "stats":
        return {"router": router.effort(), "hosts": [host.counters() for host in router.hosts]}
    return {}


def main() -> None:
    """Route until the one who started this closes the control socket or ends."""
    control, parent, *devices = map(int, sys.argv[1:])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the one who started this, who then ends it
    # A network does not wait for the commands' turns on the processor. Where that is not allowed, late packets tell.
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    wake_up_on_time()
    with socket.socket(fileno=control) as connection, connection.makefile("rw", encoding="ascii") as lines:
        configuration = json.loads(lines.readline())
        described = zip(devices, configuration["hosts"], strict=True)
        hosts = [
            Host(device, Settings(**host["settings"]), f"{configuration['seed']} {number}")
            for number, (device, host) in enumerate(described)
        ]
        routes = {
            bytes.fromhex(address): host
            for host, described_host in zip(hosts, configuration["hosts"], strict=True)
            for address in described_host["addresses"]
        }
        router = Router(hosts, routes)
        answer: dict[str, Any] = {}
        # No cycles are made here, and a collection would hold up packets.
        gc.freeze()
        gc.disable()
        while True:
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
            router.run(control)
            line = lines.readline()
            if not line:
                return
            answer = obey(router, json.loads(line))


if __name__ == "__main__":
    main()
