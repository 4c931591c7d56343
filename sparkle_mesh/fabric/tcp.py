"""One TCP port for the control plane and for direct links.

The first bytes of an accepted connection say what it is: those of a registered *magic* go to its handler,
everything else is libp2p's. Until a connection has shown that (and, for libp2p, proven its identity) it is
*unproven*: unproven sockets are few, live briefly, and the oldest of the busiest source makes way for a
newcomer, so that hundreds of idle sockets do not keep an honest dial out.

Every socket made here is remembered, so that a forked child can close its copies.
"""

from __future__ import annotations

import logging
import os
import socket as stdlib_socket
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import psutil
import trio
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError

from sparkle_mesh import limits
from sparkle_mesh.errors import UsageError
from sparkle_mesh.fabric.hubs import FabricCounters, run_guarded
from sparkle_mesh.fabric.interface import Address, RawHandler
from sparkle_mesh.fabric.networks import source_of

logger = logging.getLogger("sparkle_mesh.fabric")

_PEEK_RETRY_S = 0.01


def parse_tcp_address(address: Address) -> tuple[str, str, int]:
    """Split ``/<ip4|ip6|dns|dns4|dns6>/<host>/tcp/<port>`` (a ``/p2p/…`` tail is ignored).

    Returns
    -------
    tuple of str, str, int
        The kind of host, the host, and the port.

    Raises
    ------
    UsageError
        If it is another kind of address; the message shows the expected form.
    """
    parts = address.partition("/p2p/")[0].split("/")
    if len(parts) == 5 and not parts[0] and parts[1] in _HOST_KINDS and parts[3] == "tcp" and _is_port(parts[4]):
        kind, host, port = parts[1], parts[2], int(parts[4])
        if host and (kind not in _FAMILIES or _is_ip(_FAMILIES[kind], host)):
            return kind, host, port
    raise UsageError(f"{address!r} is not a TCP address; one looks like /ip4/192.168.1.4/tcp/{limits.DEFAULT_PORT}")


_FAMILIES = {"ip4": stdlib_socket.AF_INET, "ip6": stdlib_socket.AF_INET6}
_HOST_KINDS = {*_FAMILIES, "dns", "dns4", "dns6"}


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) <= 65535


def _is_ip(family: stdlib_socket.AddressFamily, text: str) -> bool:
    try:
        stdlib_socket.inet_pton(family, text)
    except OSError:
        return False
    return True


def tcp_address(host: str, port: int) -> Address:
    """Return the address of an IP literal and a port; the scope of a link-local one is dropped."""
    return f"/ip6/{host.partition('%')[0]}/tcp/{port}" if ":" in host else f"/ip4/{host}/tcp/{port}"


def expand_wildcard(address: Address) -> list[Address]:
    """Return ``address``, or for a wildcard one per address of an interface that is up; loopback last."""
    kind, host, port = parse_tcp_address(address)
    if host not in ("0.0.0.0", "::"):
        return [address]
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    hosts = [
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        if name in up
        for entry in entries
        # Link-local addresses mean nothing without the interface of whoever dials them.
        if entry.family == _FAMILIES[kind] and not entry.address.lower().startswith("fe80:")
    ]
    hosts.sort(key=lambda text: text.startswith("127.") or text == "::1")
    return [tcp_address(text, port) for text in hosts]


class SocketRegister:
    """Every socket that the fabric opened or accepted and that may still be open."""

    def __init__(self) -> None:
        self._sockets: weakref.WeakSet[trio.socket.SocketType] = weakref.WeakSet()

    def add(self, sock: trio.socket.SocketType) -> None:
        self._sockets.add(sock)

    def __len__(self) -> int:
        return sum(sock.fileno() >= 0 for sock in self._sockets)

    def close_all(self) -> None:
        """Close what is still open."""
        for sock in list(self._sockets):
            sock.close()

    def close_in_child(self) -> None:
        """Close this process' copies of the descriptors; the parent's stay open and nothing is sent."""
        for sock in list(self._sockets):
            # Detached, so that no destructor closes a descriptor of the same number later.
            close_descriptor(sock.detach())


def close_descriptor(descriptor: int) -> None:
    """Close ``descriptor``, unless it is closed."""
    if descriptor >= 0:
        try:
            os.close(descriptor)
        except OSError as error:
            logger.debug("descriptor %d could not be closed: %s", descriptor, error)


def _tune(sock: trio.socket.SocketType) -> None:
    """Small messages leave at once, and a host that is gone is noticed without anything being sent to it."""
    sock.setsockopt(stdlib_socket.IPPROTO_TCP, stdlib_socket.TCP_NODELAY, 1)
    sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", limits.CONTROL_KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", limits.SOCKET_KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", limits.SOCKET_KEEPALIVE_PROBES_COUNT),
        ("TCP_USER_TIMEOUT", limits.SOCKET_UNACKNOWLEDGED_TIMEOUT_S * 1000),
    ):
        option = getattr(stdlib_socket, name, None)
        if option is not None:
            sock.setsockopt(stdlib_socket.IPPROTO_TCP, option, value)


class TcpConnection(ReadWriteCloser):
    """A TCP stream as libp2p wants it.

    libp2p's own cannot tell the remote address of IPv6 connections, and asks the system twice for every message.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = b""
        self._taken_count = 0
        host, port = stream.socket.getpeername()[:2]
        self.remote = (str(host).partition("%")[0], int(port))

    async def read(self, n: int | None = None) -> bytes:
        try:
            if self._taken_count == len(self._received):
                self._received = bytes(await self._stream.receive_some(limits.STREAM_READ_MAX_BYTES))
                self._taken_count = 0
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(f"the connection is closed: {error}", transport="tcp") from error
        start = self._taken_count
        self._taken_count = len(self._received) if n is None else min(start + n, len(self._received))
        return self._received[start : self._taken_count]

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(f"the connection is closed: {error}", transport="tcp") from error

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.remote


async def dial_tcp(
    host: str, port: int, register: SocketRegister, source: tuple[str, int] | None = None
) -> trio.SocketStream:
    """Connect to an IP literal, from ``source`` if the system lets it. Raises OSError."""
    family = stdlib_socket.AF_INET6 if ":" in host else stdlib_socket.AF_INET
    sock = trio.socket.socket(family, stdlib_socket.SOCK_STREAM)
    register.add(sock)
    try:
        if source is not None:
            sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
            sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEPORT, 1)
            await sock.bind(source)
        await sock.connect((host, port))
        _tune(sock)
        return trio.SocketStream(sock)
    except BaseException:
        sock.close()
        raise


@dataclass(slots=True)
class _Unproven:
    source: str
    scope: trio.CancelScope


class UnprovenGate:
    """Bounds the sockets that have not shown yet who they are."""

    def __init__(self, counters: FabricCounters) -> None:
        self._counters = counters
        # In order of arrival.
        self._entries: dict[int, _Unproven] = {}
        self._admitted_count = 0

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def admit(self, source: str) -> Iterator[trio.CancelScope]:
        """Hold a place for one socket from ``source``; cancelled if it takes too long or must make way."""
        while len(self._entries) >= limits.UNPROVEN_SOCKETS_MAX_COUNT:
            self._evict()
        self._admitted_count += 1
        key = self._admitted_count
        with trio.move_on_after(limits.UPGRADE_TIMEOUT_S) as scope:
            self._entries[key] = _Unproven(source, scope)
            try:
                yield scope
            finally:
                self._entries.pop(key, None)

    def _evict(self) -> None:
        busiest = Counter(entry.source for entry in self._entries.values()).most_common(1)[0][0]
        key = next(key for key, entry in self._entries.items() if entry.source == busiest)
        self._entries.pop(key).scope.cancel()
        self._counters.sockets_refused += 1


class PortListener:
    """Listens on addresses and hands each connection to whom its first bytes name.

    Parameters
    ----------
    upgrade
        Called with a connection that starts with no magic; it returns once the peer is proven and the
        connection registered, or raises.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        counters: FabricCounters,
        register: SocketRegister,
        upgrade: Callable[[TcpConnection], Awaitable[None]],
    ) -> None:
        self._nursery = nursery
        self._counters = counters
        self.register = register
        self._upgrade = upgrade
        self._raw_handlers: dict[bytes, RawHandler] = {}
        self._listeners: list[trio.SocketListener] = []
        self._gate = UnprovenGate(counters)
        self._scope = trio.CancelScope()

    def handle_raw(self, magic: bytes, handler: RawHandler) -> None:
        if not 1 <= len(magic) <= limits.RAW_MAGIC_MAX_BYTES:
            raise UsageError(f"a magic has 1 to {limits.RAW_MAGIC_MAX_BYTES} bytes, {magic!r} has {len(magic)}")
        clash = next((known for known in self._raw_handlers if known.startswith(magic) or magic.startswith(known)), b"")
        if clash and clash != magic:
            raise UsageError(f"magic {magic!r} cannot be told from {clash!r}; one is the start of the other")
        self._raw_handlers[magic] = handler

    async def listen(self, address: Address) -> None:
        """Bind ``address`` and accept connections. Raises UsageError if it cannot be bound."""
        kind, host, port = parse_tcp_address(address)
        if kind not in _FAMILIES:
            raise UsageError(f"{address!r} cannot be listened on; give an IP address in place of {host!r}")
        sock = trio.socket.socket(_FAMILIES[kind], stdlib_socket.SOCK_STREAM)
        self.register.add(sock)
        try:
            if os.name == "posix":
                sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
            if kind == "ip6":
                sock.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_V6ONLY, 1)
            await sock.bind((host, port))
            sock.listen(limits.LISTEN_BACKLOG_COUNT)
            if hasattr(stdlib_socket, "SO_REUSEPORT"):
                # After it was bound: connections may be made from the port, and nobody else can listen on it.
                sock.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEPORT, 1)
        except OSError as error:
            sock.close()
            raise UsageError(
                f"cannot listen on {address}: {error.strerror or error}; choose another address"
            ) from error
        listener = trio.SocketListener(sock)
        self._listeners.append(listener)
        self._nursery.start_soon(self._accept, listener)

    def addresses(self) -> list[Address]:
        """Return what is listened on: ports as bound, wildcards as given."""
        return [tcp_address(*listener.socket.getsockname()[:2]) for listener in self._listeners]

    def source_for(self, address: Address) -> tuple[str, int] | None:
        """Return from where to dial ``address`` so that it sees this port; None where that cannot be."""
        if not hasattr(stdlib_socket, "SO_REUSEPORT"):  # pragma: no cover - Windows
            return None
        family = _FAMILIES.get(parse_tcp_address(address)[0])
        to_loopback = "/127." in address
        for listener in self._listeners:
            host, port = listener.socket.getsockname()[:2]
            if listener.socket.family == family and (
                host.startswith("127.") == to_loopback or host in ("0.0.0.0", "::")
            ):
                return host, port
        return None

    async def close(self) -> None:
        """Stop listening; connections that stand are left as they are."""
        for listener in self._listeners:
            await listener.aclose()
        self._listeners.clear()

    async def _accept(self, listener: trio.SocketListener) -> None:
        while True:
            try:
                stream = await listener.accept()
            except trio.ClosedResourceError:
                return
            except OSError as error:
                # Out of descriptors or memory: others will be freed.
                logger.warning("a connection could not be accepted: %s", error)
                await trio.sleep(_PEEK_RETRY_S)
                continue
            self.register.add(stream.socket)
            self._nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        handler = None
        proven = False
        try:
            host, port = stream.socket.getpeername()[:2]
            with self._gate.admit(source_of(tcp_address(host, port)) or host):
                _tune(stream.socket)
                handler = await self._classify(stream)
                proven = handler is not None or await self._try_upgrade(stream)
        except OSError as error:
            logger.debug("an accepted connection is gone already: %s", error)
        finally:
            if not proven:
                self._counters.upgrades_failed += 1
                await trio.aclose_forcefully(stream)
        if handler is not None:
            what = "the handler of a direct connection"
            await run_guarded(what, partial(handler, stream), partial(trio.aclose_forcefully, stream), self._counters)

    async def _try_upgrade(self, stream: trio.SocketStream) -> bool:
        upgraded = False

        async def upgrade() -> None:
            nonlocal upgraded
            await self._upgrade(TcpConnection(stream))
            upgraded = True

        abort = partial(trio.aclose_forcefully, stream)
        await run_guarded("an inbound handshake", upgrade, abort, self._counters, expected=True)
        return upgraded

    async def _classify(self, stream: trio.SocketStream) -> RawHandler | None:
        """Look at the first bytes without taking them; return the handler of their magic, if any."""
        while True:
            start = await stream.socket.recv(limits.RAW_MAGIC_MAX_BYTES, stdlib_socket.MSG_PEEK)
            for magic, handler in self._raw_handlers.items():
                if start.startswith(magic):
                    return handler
            if not start or not any(magic.startswith(start) for magic in self._raw_handlers):
                return None
            # Part of a magic: the rest cannot be waited for, because the socket counts as readable already.
            await trio.sleep(_PEEK_RETRY_S)
