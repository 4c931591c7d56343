"""Run a command on several emulated hosts, joined by links of a given rate, delay and loss.

    python benchmarks/wan_emulator.py --hosts 4 --rate 100mbit --delay 25ms --loss 0.1% -- python train.py {host}

Every host is a network namespace of this machine with a TCP stack of its own. COMMAND runs once on each, with
{host}, {hosts}, {address} and {address6} replaced in its arguments, and with these environment variables:

  WAN_HOST, WAN_HOSTS        this host's number, from 0, and how many there are
  WAN_ADDRESS, WAN_ADDRESS6  this host's addresses
  WAN_ADDRESSES              the IPv4 addresses of all hosts, in order, with commas between
  WAN_DEVICE                 the name of the network device

--delay is what a packet takes from one host to another, without the time to send its bytes: half a round trip.
--rate, --delay and --loss take one value for all hosts, or one per host with commas between. No packet leaves for
a real network. When this ends, in whatever way, its namespaces, devices and commands end with it.

Needs Linux and root. The exit code is the first that is not 0 of the commands', in order of hosts; 2 if there can be
no emulated network here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import ipaddress
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import _wan_kernel as kernel
from _wan_link import Settings

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
NETWORK = ipaddress.IPv4Network("10.77.0.0/24")
NETWORK6 = ipaddress.IPv6Network("fd00:77::/64")
MAX_HOSTS = 64
# The usual one of Linux; the machine's own may be another.
CONGESTION = "cubic"
BUSY_SHARE = 0.8
LATE_SHARE = 0.01
STOP_TIMEOUT_S = 5.0


class EmulatorError(Exception):
    """The emulator cannot start here, or its router has failed."""


class Emulator:
    """Hosts with emulated links between them. A context manager; leaving it ends commands, namespaces and devices.

    Commands end with the thread that started them: start them from one that lives as long.

    Parameters
    ----------
    settings
        One for every host.
    mtu
        The largest packet in bytes, IP header included.
    seed
        Of the losses.
    congestion
        TCP's congestion control on the hosts.
    """

    def __init__(
        self, settings: Sequence[Settings], *, mtu: int = 1500, seed: int = 0, congestion: str = CONGESTION
    ) -> None:
        if not 2 <= len(settings) <= MAX_HOSTS:
            raise EmulatorError(f"{len(settings)} hosts: there must be from 2 to {MAX_HOSTS}")
        if not 1280 <= mtu <= 65535:
            raise EmulatorError(f"an MTU of {mtu}: must be from 1280, which IPv6 needs, to 65535")
        self.settings = list(settings)
        self.mtu, self._seed, self._congestion = mtu, seed, congestion
        self.addresses = [str(NETWORK[number + 1]) for number in range(len(settings))]
        self.addresses6 = [str(NETWORK6[number + 1]) for number in range(len(settings))]
        self._commands: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Emulator:
        if lacking := kernel.why_not():
            raise EmulatorError(lacking)
        with contextlib.ExitStack() as stack:
            self._namespaces: list[int] = []
            devices: list[int] = []
            for number in range(len(self.settings)):
                namespace, device = self._make_host(number)
                stack.callback(os.close, namespace)
                self._namespaces.append(namespace)
                self._shape(number)
                devices.append(device)
            try:
                self._start_router(devices, stack)
            finally:
                for device in devices:
                    os.close(device)
            stack.callback(self._end_commands)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _make_host(self, number: int) -> tuple[int, int]:
        address = ipaddress.IPv4Interface((self.addresses[number], NETWORK.prefixlen))
        address6 = ipaddress.IPv6Interface((self.addresses6[number], NETWORK6.prefixlen))
        try:
            return kernel.make_host(address, address6, self.mtu, self._congestion)
        except OSError as error:
            raise EmulatorError(f"host {number} cannot be made: {error}") from error

    def _shape(self, number: int) -> None:
        settings = self.settings[number]
        if not settings.card:
            return
        try:
            self.inside(number, lambda: kernel.shape(settings.up_bits_per_s))
        except OSError as error:
            raise EmulatorError(f"host {number} cannot have a card: {error}; --uplink router needs none") from error

    def _start_router(self, devices: Sequence[int], stack: contextlib.ExitStack) -> None:
        ours, theirs = socket.socketpair()
        stack.callback(ours.close)
        command = [sys.executable, str(HERE / "_wan_router.py"), str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self._router = subprocess.Popen(
                [*command, *map(str, devices)], pass_fds=[theirs.fileno(), *devices], stdin=subprocess.DEVNULL
            )
        stack.callback(self._end_router)
        self._control = ours
        self._answers = stack.enter_context(ours.makefile(encoding="ascii"))
        stack.callback(ours.shutdown, socket.SHUT_RDWR)
        hosts = [
            {
                "settings": dataclasses.asdict(settings),
                "addresses": [ipaddress.ip_address(text).packed.hex() for text in pair],
            }
            for settings, pair in zip(self.settings, zip(self.addresses, self.addresses6, strict=True), strict=True)
        ]
        self._ask(hosts=hosts, seed=self._seed)

    def _end_router(self) -> None:
        try:
            self._router.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._router.kill()
            self._router.wait()

    def _end_commands(self) -> None:
        for command in self._commands:
            if command.poll() is None:
                command.kill()
                command.wait()

    def _ask(self, **command: Any) -> dict[str, Any]:
        try:
            self._control.sendall(json.dumps(command).encode() + b"\n")
            answer = self._answers.readline()
        except (BrokenPipeError, ConnectionResetError):
            answer = ""
        if not answer:
            raise EmulatorError(f"the router ended with {self._router.poll()}; its error is on stderr")
        loaded: dict[str, Any] = json.loads(answer)
        return loaded

    def start(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start ``command`` on ``host``; ``options`` are those of ``subprocess.Popen``."""
        descriptor = self._namespaces[host]
        enter = [sys.executable, str(HERE / "_wan_enter.py"), str(descriptor), str(os.getpid())]
        environment = (options.pop("env", None) or os.environ) | self.environment(host)
        started = subprocess.Popen([*enter, *command], pass_fds=[descriptor], env=environment, **options)
        self._commands.append(started)
        return started

    def environment(self, host: int) -> dict[str, str]:
        """Return the environment variables that tell a command where it is."""
        return {
            "WAN_HOST": str(host),
            "WAN_HOSTS": str(len(self.settings)),
            "WAN_ADDRESS": self.addresses[host],
            "WAN_ADDRESS6": self.addresses6[host],
            "WAN_ADDRESSES": ",".join(self.addresses),
            "WAN_DEVICE": kernel.DEVICE,
        }

    def inside(self, host: int, function: Callable[[], T]) -> T:
        """Call ``function`` in a thread on ``host``: a socket made there is that host's, and stays so."""

        def call() -> T:
            kernel.enter_namespace(self._namespaces[host])
            return function()

        return kernel.in_new_thread(call)

    def set_rate(self, host: int, *, up: float | None = None, down: float | None = None) -> None:
        """Change a host's rates, in bits per second."""
        now = self.settings[host]
        self._change(host, up_bits_per_s=up or now.up_bits_per_s, down_bits_per_s=down or now.down_bits_per_s)

    def set_delay(self, host: int, seconds: float) -> None:
        """Change the delay of what the host sends."""
        self._change(host, delay_s=seconds)

    def set_loss(self, host: int, share: float) -> None:
        """Change the share of segments lost of what the host sends."""
        self._change(host, loss=share)

    def _change(self, host: int, **changes: Any) -> None:
        self.settings[host] = dataclasses.replace(self.settings[host], **changes)
        self._shape(host)
        self._ask(what="change", host=host, settings=dataclasses.asdict(self.settings[host]))

    def cut(self, host: int) -> None:
        """Lose all that the host sends and all that is sent to it, until :meth:`restore`."""
        self._ask(what="connect", host=host, connected=False)

    def restore(self, host: int) -> None:
        """End a :meth:`cut`."""
        self._ask(what="connect", host=host, connected=True)

    def stats(self) -> dict[str, Any]:
        """Return how busy the router was since :meth:`reset_stats`, and what each host's links did from the start."""
        return self._ask(what="stats")

    def reset_stats(self) -> None:
        """Begin to count anew how busy the router is."""
        self._ask(what="reset")


def describe_effort(router: dict[str, Any]) -> str:
    """Return in one line how busy the router was, with a warning if figures should not be trusted."""
    late = router["late_packets"] / max(1, router["packets"])
    text = f"emulator: {router['cpu_share']:.0%} of a core busy, {router['packets']} packets"
    text += f", {late:.2%} over 1 ms late (worst {router['latest_s'] * 1e3:.1f} ms)"
    if router["cpu_share"] > BUSY_SHARE or late > LATE_SHARE:
        text += "; WARNING: the emulator, not only its links, held packets up: lower the rate or free the machine"
    return text


def parse_rate(text: str) -> float:
    """Return the bits per second that ``text`` names: ``100mbit``, ``1gbit``, ``512kbit``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)bit", text.strip().lower())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate; write 100mbit, 1gbit or 512kbit")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


def parse_delay(text: str) -> float:
    """Return the seconds that ``text`` names: ``25ms``, ``100us``, ``1s``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a delay; write 25ms, 100us or 1s")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1}[match[2]]


def parse_loss(text: str) -> float:
    """Return the share that ``text`` names: ``0.1%``, ``0.001``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a loss; write 0.1% or 0.001")
    return share


def parse_list(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Return a parser of values with commas between."""

    def parse_all(text: str) -> list[T]:
        return [parse(part) for part in text.split(",")]

    return parse_all


def per_host(option: str, values: Sequence[T], hosts: int) -> list[T]:
    """Return one of ``values`` for every host."""
    if len(values) not in (1, hosts):
        raise EmulatorError(f"{option} has {len(values)} values for {hosts} hosts: give one for all, or one for each")
    return [values[number % len(values)] for number in range(hosts)]


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument("--rate", type=parse_list(parse_rate), default=[1e9], help="both ways (default: 1gbit)")
    parser.add_argument("--down-rate", type=parse_list(parse_rate), help="towards the hosts (default: as --rate)")
    parser.add_argument("--delay", type=parse_list(parse_delay), default=[0.0], help="one way (default: 0ms)")
    parser.add_argument("--loss", type=parse_list(parse_loss), default=[0.0], help="of segments (default: 0%%)")
    parser.add_argument("--mtu", type=int, default=1500, help="bytes of a packet (default: %(default)s)")
    parser.add_argument("--queue", type=int, metavar="BYTES", help="of each link (default: rate x 2 delay, 512 KiB)")
    parser.add_argument(
        "--uplink",
        choices=("router", "card"),
        default="router",
        help="whether the uplink's queue is a router's, which drops what does not fit, or the host's own network "
        "card's, for which senders wait (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the losses (default: %(default)s)")
    parser.add_argument("--congestion", default=CONGESTION, help="TCP's congestion control (default: %(default)s)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run on every host")
    return parser.parse_args(arguments)


def make_settings(options: argparse.Namespace) -> list[Settings]:
    """Return every host's settings."""
    ups = per_host("--rate", options.rate, options.hosts)
    downs = per_host("--down-rate", options.down_rate or options.rate, options.hosts)
    delays = per_host("--delay", options.delay, options.hosts)
    losses = per_host("--loss", options.loss, options.hosts)
    try:
        every = zip(ups, downs, delays, losses, strict=True)
        return [Settings(*values, options.queue, card=options.uplink == "card") for values in every]
    except ValueError as error:
        raise EmulatorError(str(error)) from error


def fill_in(text: str, places: dict[str, str]) -> str:
    """Return ``text`` with the names of ``places`` in braces replaced; other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda match: places.get(match[1], match[0]), text)


def run(options: argparse.Namespace) -> int:
    """Run the command on every host; return the exit code."""
    with Emulator(make_settings(options), mtu=options.mtu, seed=options.seed, congestion=options.congestion) as wan:
        commands = []
        for host in range(options.hosts):
            places = {"host": str(host), "hosts": str(options.hosts)}
            places |= {"address": wan.addresses[host], "address6": wan.addresses6[host]}
            commands.append(wan.start(host, [fill_in(part, places) for part in options.command]))
        codes = [command.wait() for command in commands]
        print(describe_effort(wan.stats()["router"]), file=sys.stderr)
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        return run(parse_options(arguments))
    except EmulatorError as error:
        print(f"wan_emulator.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
