"""Peers to begin with: addresses, and names in DNS that stand for addresses (libp2p's ``/dnsaddr``)."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Sequence

import trio

from sparkle_mesh import limits
from sparkle_mesh.discovery.addresses import EXAMPLE, is_dialable
from sparkle_mesh.errors import ProtocolError, SparkleError, UnreachableError, UsageError
from sparkle_mesh.fabric.identity import check_peer_id
from sparkle_mesh.fabric.interface import PeerId
from sparkle_mesh.wire import PeerAddress

logger = logging.getLogger(__name__)

#: The bootstrap peers of the public libp2p network.
PUBLIC_BOOTSTRAP = ("/dnsaddr/bootstrap.libp2p.io",)

_DNSADDR = "/dnsaddr/"
_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]{0,62})(\.[A-Za-z0-9-]{1,63})+")

#: Returns the TXT records of a name, or raises SparkleError.
ResolveTxt = Callable[[str], Awaitable[Sequence[str]]]


def check_bootstrap(item: str, what: str = "") -> None:
    """Make sure that ``item``, which comes from ``what``, is an address with a ``/p2p/…`` tail, or ``/dnsaddr/<name>``.

    Raises
    ------
    UsageError
        If not; the message shows what it should look like.
    """
    if what:
        try:
            check_bootstrap(item)
        except UsageError as error:
            raise UsageError(f"{what}: {error}") from error
        return
    if not item.startswith(_DNSADDR):
        _parse(item)
    else:
        name, _, tail = item.removeprefix(_DNSADDR).partition("/")
        if not _NAME.fullmatch(name) or (tail and not tail.startswith("p2p/")):
            raise UsageError(f"bootstrap peer {item!r} is no domain's; one looks like {PUBLIC_BOOTSTRAP[0]}")


def choose_bootstrap(
    given: Sequence[str] | None, *, mesh: str, keyed: bool, public: bool, preset: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the bootstrap peers of a mesh: those ``given``, else the ``preset`` ones, else the public ones.

    A mesh without a key that is not public is of this host and its local networks: it needs none unless they are given.
    A public mesh that is named like a domain has those of that domain besides; one with a key hides its name.

    Raises
    ------
    UsageError
        If one of them is none.
    """
    for item in preset or ():
        # Told even where it is not used: it was meant to be.
        check_bootstrap(item, "SPARKLE_BOOTSTRAP")
    chosen = () if given is not None and tuple(given) == ("none",) else given
    if chosen is None:
        chosen = () if not keyed and not public else preset if preset is not None else PUBLIC_BOOTSTRAP
        if chosen and not keyed and is_domain(mesh):
            chosen = (*chosen, bootstrap_of_domain(mesh))
    for item in chosen:
        check_bootstrap(item)
    return tuple(chosen)


def is_domain(name: str) -> bool:
    """Whether a mesh's name is one that may be looked up in DNS for its bootstrap peers."""
    return _NAME.fullmatch(name) is not None and not name.rpartition(".")[2].isdigit()


def bootstrap_of_domain(name: str) -> str:
    """Return what stands for the bootstrap peers of a domain."""
    return _DNSADDR + name


def _parse(text: str) -> tuple[PeerId, str]:
    """Split an address; that of a public peer, whose key may be of another kind than ours."""
    address, separator, peer_id = text.rpartition("/p2p/")
    shown = repr(text[: limits.ADDRESS_MAX_CHARS])
    try:
        check_peer_id(peer_id if separator else "")
    except ProtocolError as error:
        raise UsageError(
            f"bootstrap peer {shown} is neither /dnsaddr/<domain> nor an address that ends in a peer id; "
            f"give one like {EXAMPLE}, or none"
        ) from error
    if not is_dialable(address):
        raise UsageError(f"bootstrap peer {shown} has no TCP address that can be dialed; one looks like {EXAMPLE}")
    return peer_id, address


async def resolve_txt(name: str) -> Sequence[str]:
    """Ask DNS for the TXT records of ``name``.

    Raises
    ------
    UnreachableError
        If there is no answer, or no such name.
    """
    # Loads a DNS client; most programs need none.
    from dns.asyncresolver import Resolver
    from dns.exception import DNSException

    try:
        answer = await Resolver().resolve(name, "TXT", lifetime=limits.DNS_TIMEOUT_S)
    except (DNSException, OSError) as error:
        raise UnreachableError(f"DNS does not tell of {name}: {error}") from error
    return [b"".join(record.strings).decode("utf-8", "replace") for record in answer]


async def resolve_bootstrap(items: Sequence[str], resolve: ResolveTxt = resolve_txt) -> list[PeerAddress]:
    """Return the peers that ``items`` stand for, with those of their addresses that can be dialed.

    Of a name that cannot be resolved a line is logged.
    """
    found: dict[PeerId, list[str]] = {}
    waiting = [(item, 0) for item in items]
    seen: set[str] = set()
    while waiting and len(seen) < limits.BOOTSTRAP_LOOKUPS_MAX_COUNT:
        item, depth = waiting.pop(0)
        if item in seen:
            continue
        seen.add(item)
        if not item.startswith(_DNSADDR):
            _add(found, item)
        elif depth < limits.BOOTSTRAP_DEPTH_MAX_COUNT:
            name, _, tail = item.removeprefix(_DNSADDR).partition("/")
            wanted = f"/{tail}" if tail else ""
            waiting += [(target, depth + 1) for target in await _targets(name, resolve) if target.endswith(wanted)]
    peers = [PeerAddress(peer_id=peer_id, addresses=tuple(addresses)) for peer_id, addresses in found.items()]
    return peers[: limits.BOOTSTRAP_PEERS_MAX_COUNT]


def _add(found: dict[PeerId, list[str]], item: str) -> None:
    try:
        peer_id, address = _parse(item)
    except UsageError:
        # Public peers list addresses of transports that are not spoken here, too.
        return
    addresses = found.setdefault(peer_id, [])
    if address not in addresses and len(addresses) < limits.ADDRESSES_PER_PEER_MAX_COUNT:
        addresses.append(address)


async def _targets(name: str, resolve: ResolveTxt) -> list[str]:
    try:
        with trio.fail_after(2 * limits.DNS_TIMEOUT_S):
            records = await resolve(f"_dnsaddr.{name}")
    except (SparkleError, trio.TooSlowError) as error:
        logger.info("bootstrap peers of %s are not known: %s", name, str(error) or "DNS does not answer")
        return []
    targets = [text.removeprefix("dnsaddr=") for text in records if text.startswith("dnsaddr=/")]
    return [text for text in targets if len(text) <= limits.ADDRESS_MAX_CHARS][: limits.BOOTSTRAP_PEERS_MAX_COUNT]
