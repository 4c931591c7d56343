"""Measure an encrypted TCP link between two processes beside a plain TCP connection, on the loopback interface.

Both carry the same messages between the same two processes, in turns, and the CPU time of both processes counts.
``one way``: one side sends messages back to back. ``round trip``: a message goes there and one comes back.
The plain side is a pair of blocking sockets that move nothing but the bytes: the bound, not a protocol.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import trio
from _figures import UNITS, format_seconds, format_size, make_table, spread

from sparkle_mesh.transport.ciphers import AES_256_GCM, CHACHA20_POLY1305
from sparkle_mesh.transport.records import RecordOpener, RecordSealer
from sparkle_mesh.transport.tcp import TcpLink

HEADER = b"h" * 64
ONE_WAY, ROUND_TRIP = "one way", "round trip"
SECONDS_PER_TURN = 0.3
# Keys for a measurement, not for secrets.
THERE, BACK = b"1" * 32, b"2" * 32


class Side(Protocol):
    """One end of what is measured. All messages have the same size."""

    async def send(self, count: int) -> None: ...

    async def receive(self, count: int) -> None: ...


class LinkSide:
    """An end of an encrypted link."""

    def __init__(self, sock: socket.socket, nbytes: int, cipher: str, first: bool) -> None:
        mine, theirs = (THERE, BACK) if first else (BACK, THERE)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self.link = TcpLink(stream, "the other side", RecordSealer(cipher, mine), RecordOpener(cipher, theirs))
        self.buffers = (bytearray(nbytes),) if nbytes else ()

    async def send(self, count: int) -> None:
        for _ in range(count):
            await self.link.send(HEADER, self.buffers)

    async def receive(self, count: int) -> None:
        for _ in range(count):
            await self.link.receive_header()
            await self.link.receive_into(self.buffers)


class PlainSide:
    """An end of a plain connection; blocks, as nothing else runs."""

    def __init__(self, sock: socket.socket, nbytes: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.buffer = memoryview(bytearray(len(HEADER) + nbytes))

    async def send(self, count: int) -> None:
        for _ in range(count):
            self.sock.sendall(self.buffer)

    async def receive(self, count: int) -> None:
        for _ in range(count):
            missing = len(self.buffer)
            while missing:
                received = self.sock.recv_into(self.buffer[-missing:])
                if not received:
                    raise SystemExit("the other side is gone")
                missing -= received


def make_side(sock: socket.socket, name: str, nbytes: int, first: bool) -> Side:
    """Return an end of kind ``name``: a cipher's, or ``plain``."""
    return PlainSide(sock, nbytes) if name == "plain" else LinkSide(sock, nbytes, name, first)


async def run_turn(side: Side, what: str, count: int, first: bool) -> dict[str, float]:
    """Move ``count`` messages; return seconds and CPU seconds of this process."""
    cpu, started = time.process_time(), time.perf_counter()
    if what == ONE_WAY:
        await (side.send(count) if first else side.receive(count))
        # One message back: the time is that until all have arrived.
        await (side.receive(1) if first else side.send(1))
    else:
        for _ in range(count):
            if first:
                await side.send(1)
            await side.receive(1)
            if not first:
                await side.send(1)
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}


async def serve() -> None:
    """Be the second process: take commands from stdin, one JSON object a line."""
    sides: dict[str, Side] = {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            if command.get("open"):
                sides[command["name"]] = make_side(listener.accept()[0], command["name"], command["bytes"], False)
                continue
            figures = await run_turn(sides[command["name"]], command["what"], command["count"], False)
            print(json.dumps(figures), flush=True)


class Measurement:
    """One kind and size of message, over every side in turns."""

    def __init__(self, child: subprocess.Popen[str], port: int, what: str, nbytes: int, names: Sequence[str]) -> None:
        self.child, self.what, self.nbytes, self.names = child, what, nbytes, list(names)
        self.sides: dict[str, Side] = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.cpu_seconds: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            self._tell(open=True, name=name, bytes=nbytes)
            self.sides[name] = make_side(socket.create_connection(("127.0.0.1", port)), name, nbytes, True)

    def _tell(self, **command: Any) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(command) + "\n")
        self.child.stdin.flush()

    async def _turn(self, name: str, count: int) -> tuple[float, float]:
        """Return seconds, and CPU seconds of both processes, per message."""
        assert self.child.stdout is not None
        self._tell(name=name, what=self.what, count=count)
        mine = await run_turn(self.sides[name], self.what, count, True)
        theirs = json.loads(self.child.stdout.readline())
        return mine["seconds"] / count, (mine["cpu_seconds"] + theirs["cpu_seconds"]) / count

    async def run(self, rounds: int) -> None:
        """Measure ``rounds`` turns of every side, the first of them to warm up and to find the count."""
        counts = {}
        for name in self.names:
            each, _ = await self._turn(name, 20)
            counts[name] = max(5, int(SECONDS_PER_TURN / each))
        for turn in range(rounds):
            for name in self.names[turn % len(self.names) :] + self.names[: turn % len(self.names)]:
                seconds, cpu_seconds = await self._turn(name, counts[name])
                self.seconds[name].append(seconds)
                self.cpu_seconds[name].append(cpu_seconds)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per encrypted side, beside plain TCP."""
        peer_s = statistics.median(self.seconds["plain"])
        return [
            {
                "what": self.what,
                "link": f"tcp, {name}",
                "ranks": 2,
                "bytes": self.nbytes,
                "header_bytes": len(HEADER),
                "ours_s": statistics.median(self.seconds[name]),
                "peer": "plain tcp",
                "peer_s": peer_s,
                "ratio": peer_s / statistics.median(self.seconds[name]),
                "ours_spread": spread(self.seconds[name]),
                "peer_spread": spread(self.seconds["plain"]),
                "ours_cpu_s": statistics.median(self.cpu_seconds[name]),
                "peer_cpu_s": statistics.median(self.cpu_seconds["plain"]),
            }
            for name in self.names
            if name != "plain"
        ]


def describe(row: dict[str, Any]) -> list[str]:
    """Return the cells that the table shows of ``row``."""

    def rate(seconds: float) -> str:
        return f"{row['bytes'] / seconds / 1e9:.2f} GB/s" if row["bytes"] >= 4096 else format_seconds(seconds)

    return [
        row["what"],
        format_size(row["bytes"]),
        row["link"],
        rate(row["ours_s"]),
        rate(row["peer_s"]),
        f"{row['ratio']:.2f}",
        f"{row['ours_cpu_s'] * 1e6:.0f} us",
        f"{row['peer_cpu_s'] * 1e6:.0f} us",
    ]


COLUMNS = ("what", "payload", "link", "ours", "plain tcp", "ratio", "CPU", "plain's")


async def measure_all(
    child: subprocess.Popen[str], sizes: Sequence[int], ciphers: Sequence[str], rounds: int
) -> list[dict[str, Any]]:
    """Return the rows of all measurements."""
    assert child.stdout is not None
    port = json.loads(child.stdout.readline())["port"]
    rows = []
    for what, nbytes in [*((ONE_WAY, size) for size in sizes), (ROUND_TRIP, 0), (ROUND_TRIP, 65536)]:
        measurement = Measurement(child, port, what, nbytes, [*ciphers, "plain"])
        await measurement.run(rounds)
        rows += measurement.rows()
    return rows


def parse_size(text: str) -> int:
    """Return the bytes that ``0``, ``64KiB`` or ``1MiB`` names."""
    digits = text.rstrip("KMGiBkmgb")
    try:
        return int(digits) * UNITS[text[len(digits) :].upper()]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 64KiB, 1MiB or a number of bytes") from None


def main() -> None:
    """Parse arguments, measure, print, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_sizes = [0, 65536, 524288, 1048576, 8388608]
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=default_sizes, help="payloads, such as 1MiB")
    parser.add_argument("--ciphers", nargs="+", choices=(AES_256_GCM, CHACHA20_POLY1305), default=[AES_256_GCM])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        trio.run(serve)
        return
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            rows = trio.run(measure_all, child, arguments.sizes, arguments.ciphers, arguments.rounds)
        finally:
            child.terminate()
    print(make_table(COLUMNS, [describe(row) for row in rows]))
    print("ratio: of speeds, above 1 is ahead of plain TCP; CPU: of both processes together, per message")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"cpus": os.cpu_count(), "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
