"""A small internet of network namespaces: hosts with public addresses, and hosts behind NATs made with nftables."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pytest

#: ``cone``: a port keeps its number outside, and only who was sent something may answer (as Linux does it, and most
#: routers at home). ``symmetric``: another number for each peer. ``forwarding``: as ``cone``, and what comes to one
#: port is passed on to the host behind. ``mapping``: as ``cone``, with the chains that miniupnpd fills.
NatKind = Literal["cone", "symmetric", "forwarding", "mapping"]

_FOR_MINIUPNPD = """
    table inet filter {
        chain forward { type filter hook forward priority 0; jump miniupnpd; }
        chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
        chain postrouting { type nat hook postrouting priority 90; jump postrouting_miniupnpd; }
        chain miniupnpd { }
        chain prerouting_miniupnpd { }
        chain postrouting_miniupnpd { }
    }
"""

PORT = 45654

needs_namespaces = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nft"),
    reason="needs root, and `apt-get install iproute2 nftables`, as .ci/run does",
)


def run(*command: str, **options: Any) -> str:
    """Run ``command`` to its end and return what it prints."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20, **options)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


class Host:
    """One host: a namespace with an address."""

    def __init__(self, lab: NatLab, namespace: str, address: str) -> None:
        self._lab, self.namespace, self.address = lab, namespace, address

    def start(self, *command: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Start ``command`` there; it is ended with the lab."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
        self._lab.ended_with(process)
        return process


class NatLab:
    """Makes hosts; a context manager that takes all of it away again."""

    def __init__(self, name: str) -> None:
        # Names of devices have 15 characters at most.
        self._name = f"sp{os.getpid() % 100000}{name}"[:9]
        self._stack = ExitStack()
        self._count = 0
        self._internet = ""

    def __enter__(self) -> NatLab:
        self._internet = self._namespace("i")
        self._in(self._internet, "ip", "link", "add", "br0", "type", "bridge")
        self._in(self._internet, "ip", "link", "set", "br0", "up")
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def ended_with(self, process: subprocess.Popen[str]) -> None:
        """End ``process`` before the namespaces go."""

        def end() -> None:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            process.kill()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()

        self._stack.callback(end)

    def public_host(self) -> Host:
        """Return a new host that everybody can dial."""
        return self._host_on_internet("h")

    def host_behind(self, kind: NatKind) -> tuple[Host, Host]:
        """Return a new host behind a NAT of its own of this ``kind``, and the NAT."""
        nat = self._host_on_internet("n")
        inside = self._namespace("b")
        self._link(nat.namespace, "lan", inside, "eth0")
        # The same on both sides, as at home.
        self._in(nat.namespace, "ip", "address", "add", "192.168.1.1/24", "dev", "lan")
        self._in(inside, "ip", "address", "add", "192.168.1.2/24", "dev", "eth0")
        self._in(inside, "ip", "route", "add", "default", "via", "192.168.1.1")
        self._in(nat.namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        how = "masquerade fully-random" if kind == "symmetric" else "masquerade"
        forward = f'iifname "wan" tcp dport {PORT} dnat to 192.168.1.2' if kind == "forwarding" else ""
        passed = "ct status dnat accept" if kind in ("forwarding", "mapping") else ""
        ruleset = f"""
            {_FOR_MINIUPNPD if kind == "mapping" else ""}
            table ip nat {{
                chain before {{ type nat hook prerouting priority dstnat; {forward}
                }}
                chain after {{ type nat hook postrouting priority srcnat; oifname "wan" {how}; }}
            }}
            table ip filter {{
                chain input {{
                    type filter hook input priority filter; policy drop;
                    iifname {{ "lo", "lan" }} accept
                    ct state established,related accept
                }}
                chain forward {{
                    type filter hook forward priority filter; policy drop;
                    iifname "lan" accept
                    ct state established,related accept
                    {passed}
                }}
            }}
        """
        self._in(nat.namespace, "nft", "-f", "-", input=ruleset)
        return Host(self, inside, "192.168.1.2"), nat

    def _host_on_internet(self, letter: str) -> Host:
        namespace = self._namespace(letter)
        address = f"44.0.{self._count}.{10 + self._count}"
        device = f"p{self._count}"
        self._link(self._internet, device, namespace, "wan")
        self._in(self._internet, "ip", "link", "set", device, "master", "br0")
        self._in(namespace, "ip", "address", "add", f"{address}/8", "dev", "wan")
        return Host(self, namespace, address)

    def _namespace(self, letter: str) -> str:
        self._count += 1
        name = f"{self._name}{letter}{self._count}"
        run("ip", "netns", "add", name)
        self._stack.callback(run, "ip", "netns", "delete", name)
        self._in(name, "ip", "link", "set", "lo", "up")
        return name

    def _link(self, one: str, one_device: str, other: str, other_device: str) -> None:
        self._in(one, "ip", "link", "add", one_device, "type", "veth", "peer", "name", other_device, "netns", other)
        self._in(one, "ip", "link", "set", one_device, "up")
        self._in(other, "ip", "link", "set", other_device, "up")

    def _in(self, namespace: str, *command: str, **options: Any) -> str:
        return run("ip", "netns", "exec", namespace, *command, **options)
