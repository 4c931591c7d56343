"""The Linux calls under the emulator: network namespaces, TUN devices, processes that end with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import ipaddress
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

TUN: Final = Path("/dev/net/tun")
DEVICE: Final = "wan0"
# Between the kernel and the router; never to fill, since drops belong into the emulated queues.
DEVICE_QUEUE_PACKETS: Final = 8192
# Of an emulated network card: more than senders are let have in it, and the largest packet with all headers.
CARD_QUEUE_BYTES: Final = 64 << 20
CARD_BURST_BYTES: Final = 72 << 10

_CONGESTION: Final = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_ALLOWED: Final = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
_CLONE_NEWNET: Final = 0x40000000
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_TIMERSLACK: Final = 29
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_OFFLOADS: Final = 0x01 | 0x02 | 0x04  # TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFADDR: Final = 0x8916
_SIOCSIFNETMASK: Final = 0x891C
_SIOCSIFMTU: Final = 0x8922
_SIOCGIFINDEX: Final = 0x8933
_SIOCSIFTXQLEN: Final = 0x8943
_IFF_UP: Final = 0x1
_RTM_NEWQDISC: Final = 36
_REQUEST_ACK_CREATE_REPLACE: Final = 0x1 | 0x4 | 0x400 | 0x100
_TC_H_ROOT: Final = 0xFFFFFFFF
_TCA_KIND: Final = 1
_TCA_OPTIONS: Final = 2
_TCA_TBF_PARMS: Final = 1
_TCA_TBF_RATE64: Final = 4
_TCA_TBF_BURST: Final = 6
_LINKLAYER_ETHERNET: Final = 1


def why_not() -> str | None:
    """Return in one line what this system lacks for emulated networks; None if nothing."""
    if os.uname().sysname != "Linux":
        return f"emulated networks need Linux, and this is {os.uname().sysname}"
    if os.geteuid():
        return f"emulated networks need root, and this is user {os.geteuid()}: run it with sudo"
    if not TUN.exists():
        return f"{TUN} is missing: load the kernel's module with `modprobe tun`, or give the container the device"
    return None


def _libc(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*(ctypes.c_ulong(argument) for argument in arguments)):
        number = ctypes.get_errno()
        advice = " (root with CAP_SYS_ADMIN is needed)" if number == errno.EPERM else ""
        raise OSError(number, f"{function}: {os.strerror(number)}{advice}")


def enter_namespace(descriptor: int) -> None:
    """Move the calling thread into the network namespace behind ``descriptor``."""
    _libc("setns", descriptor, _CLONE_NEWNET)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, process ``parent``, ends in whatever way."""
    _libc("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError(errno.ESRCH, f"process {parent}, which started this one, is gone")


def wake_up_on_time() -> None:
    """Have the kernel end this thread's waits when asked, not up to 50 µs later."""
    _libc("prctl", _PR_SET_TIMERSLACK, 1)


def in_new_thread(function: Callable[[], T]) -> T:
    """Call ``function`` in a thread of its own: what it does to its network namespace ends with it."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(function).result()


def make_host(
    address: ipaddress.IPv4Interface, address6: ipaddress.IPv6Interface, mtu: int, congestion: str
) -> tuple[int, int]:
    """Make a network namespace with one TUN device; return descriptors of both. They are all that keeps them alive."""

    def make() -> tuple[int, int]:
        _libc("unshare", _CLONE_NEWNET)
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _configure("lo", None, None, None)
            # A new namespace begins with the congestion control of the machine, which need not be the usual one.
            _CONGESTION.write_text(congestion)
            device = _open_tun()
            _configure(DEVICE, address, address6, mtu)
        except BaseException:
            os.close(namespace)
            raise
        return namespace, device

    with _allowed(congestion):
        return in_new_thread(make)


@contextlib.contextmanager
def _allowed(congestion: str) -> Iterator[None]:
    """Let namespaces choose ``congestion`` inside; elsewhere they may choose only what the machine allows to all."""
    try:
        allowed = _ALLOWED.read_text()
    except FileNotFoundError:  # not in the machine's first namespace: what it allows cannot be changed from here
        yield
        return
    if congestion in allowed.split():
        yield
        return
    _ALLOWED.write_text(f"{allowed.strip()} {congestion}")
    try:
        yield
    finally:
        _ALLOWED.write_text(allowed)


def shape(bits_per_s: float) -> None:
    """Have the device of this thread's namespace send at this rate, as a network card does.

    What waits then waits in the kernel, which knows whose it is and makes the senders wait: nothing is dropped. It is
    a token bucket (tbf), large enough for the packets of 64 KiB that the kernel hands to a card.
    """
    rate = struct.pack("=BBHhHI", 0, _LINKLAYER_ETHERNET, 0, -1, 0, min(int(bits_per_s / 8), 0xFFFFFFFF))
    parameters = struct.pack("=12s12sIII", rate, bytes(12), CARD_QUEUE_BYTES, 0, 0)
    options = _attribute(_TCA_TBF_PARMS, parameters) + _attribute(
        _TCA_TBF_RATE64, struct.pack("=Q", int(bits_per_s / 8))
    )
    options += _attribute(_TCA_TBF_BURST, struct.pack("=I", CARD_BURST_BYTES))
    message = struct.pack("=BxxxiIII", socket.AF_UNSPEC, socket.if_nametoindex(DEVICE), 0x10000, _TC_H_ROOT, 0)
    message += _attribute(_TCA_KIND, b"tbf\0") + _attribute(_TCA_OPTIONS, options)
    header = struct.pack("=IHHII", 16 + len(message), _RTM_NEWQDISC, _REQUEST_ACK_CREATE_REPLACE, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(header + message)
        (error,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    if error:
        raise OSError(-error, f"the kernel's token bucket (tbf) cannot be used: {os.strerror(-error)}")


def _attribute(kind: int, value: bytes) -> bytes:
    padding = bytes(-len(value) % 4)
    return struct.pack("=HH", 4 + len(value), kind) + value + padding


def _open_tun() -> int:
    device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
        fcntl.ioctl(device, _TUNSETOFFLOAD, _OFFLOADS)
    except BaseException:
        os.close(device)
        raise
    return device


def _configure(
    device: str, address: ipaddress.IPv4Interface | None, address6: ipaddress.IPv6Interface | None, mtu: int | None
) -> None:
    name = device.encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        if mtu is not None:
            fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si20x", name, mtu))
            fcntl.ioctl(control, _SIOCSIFTXQLEN, struct.pack("16si20x", name, DEVICE_QUEUE_PACKETS))
        if address is not None:
            for request, value in ((_SIOCSIFADDR, address.ip), (_SIOCSIFNETMASK, address.netmask)):
                packed = struct.pack("16sH2x4s16x", name, socket.AF_INET, value.packed)
                fcntl.ioctl(control, request, packed)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16s24x", name)), 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | _IFF_UP))
        (index,) = struct.unpack_from("i", fcntl.ioctl(control, _SIOCGIFINDEX, struct.pack("16s24x", name)), 16)
    if address6 is not None and socket.has_ipv6:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
            packed = struct.pack("16sIi", address6.ip.packed, address6.network.prefixlen, index)
            fcntl.ioctl(control, _SIOCSIFADDR, packed)
