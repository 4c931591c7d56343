"""Bootstrap peers: what is one, and what names in DNS come to; with a DNS server of the test's own, too."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import dns.asyncresolver
import dns.message
import dns.rrset
import pytest
import trio

from sparkle_mesh import limits
from sparkle_mesh.discovery.bootstrap import (
    PUBLIC_BOOTSTRAP,
    check_bootstrap,
    choose_bootstrap,
    is_domain,
    resolve_bootstrap,
    resolve_txt,
)
from sparkle_mesh.errors import UnreachableError, UsageError
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.wire import PeerAddress

PEER = Identity(bytes(32)).peer_id
RSA_PEER = "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN"
ADDRESS = f"/ip4/44.0.0.1/tcp/4001/p2p/{PEER}"

RECORDS = {
    "_dnsaddr.bootstrap.example.org": [
        "dnsaddr=/dnsaddr/one.example.org/p2p/" + PEER,
        "dnsaddr=/dnsaddr/two.example.org/p2p/" + RSA_PEER,
        "v=spf1 -all",
        "dnsaddr=/dnsaddr/" + "x" * 400,
    ],
    "_dnsaddr.one.example.org": [
        "dnsaddr=" + ADDRESS,
        f"dnsaddr=/ip6/2001:db8::1/tcp/4001/p2p/{PEER}",
        f"dnsaddr=/ip4/44.0.0.1/udp/4001/quic-v1/p2p/{PEER}",
        f"dnsaddr=/ip4/44.0.0.9/tcp/4001/p2p/{RSA_PEER}",
    ],
    "_dnsaddr.two.example.org": [f"dnsaddr=/dns4/two.example.org/tcp/4001/p2p/{RSA_PEER}"],
    "_dnsaddr.loop.example.org": ["dnsaddr=/dnsaddr/loop.example.org", "dnsaddr=/dnsaddr/again.example.org"],
    "_dnsaddr.again.example.org": ["dnsaddr=/dnsaddr/loop.example.org", "dnsaddr=" + ADDRESS],
    **{f"_dnsaddr.deep{depth}.example.org": [f"dnsaddr=/dnsaddr/deep{depth + 1}.example.org"] for depth in range(100)},
}


async def resolve(name: str) -> Sequence[str]:
    if name not in RECORDS:
        raise UnreachableError(f"no {name}")
    return RECORDS[name]


async def test_names_stand_for_names_that_stand_for_addresses() -> None:
    peers = await resolve_bootstrap(["/dnsaddr/bootstrap.example.org"], resolve)
    assert peers == [
        PeerAddress(peer_id=PEER, addresses=("/ip4/44.0.0.1/tcp/4001", "/ip6/2001:db8::1/tcp/4001")),
        PeerAddress(peer_id=RSA_PEER, addresses=("/dns4/two.example.org/tcp/4001",)),
    ]


async def test_what_leads_round_in_circles_too_deep_or_nowhere_ends(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        peers = await resolve_bootstrap(["/dnsaddr/nowhere.example.org", "/dnsaddr/loop.example.org", ADDRESS], resolve)
        assert [peer.peer_id for peer in peers] == [PEER]
        assert await resolve_bootstrap(["/dnsaddr/deep0.example.org"], resolve) == []
    assert "bootstrap peers of nowhere.example.org are not known" in caplog.text


async def test_who_lists_many_is_cut_short() -> None:
    asked = []

    async def many(name: str) -> Sequence[str]:
        asked.append(name)
        return [f"dnsaddr=/dnsaddr/{len(asked)}-{number}.example.org" for number in range(1000)]

    assert await resolve_bootstrap(["/dnsaddr/many.example.org"], many) == []
    assert len(asked) <= limits.BOOTSTRAP_LOOKUPS_MAX_COUNT


async def test_dns_that_does_not_answer_is_not_waited_for_long(autojump_clock) -> None:
    async def silent(name: str) -> Sequence[str]:
        await trio.sleep_forever()
        raise AssertionError

    with trio.fail_after(3 * limits.DNS_TIMEOUT_S):
        assert await resolve_bootstrap(["/dnsaddr/silent.example.org"], silent) == []


async def test_a_real_dns_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        await server.bind(("127.0.0.1", 0))

        async def serve() -> None:
            while True:
                data, sender = await server.recvfrom(4096)
                query = dns.message.from_wire(data)
                response = dns.message.make_response(query)
                name = query.question[0].name.to_text(omit_final_dot=True)
                if name in RECORDS:
                    texts = [f'"{text[:100]}" "{text[100:]}"' for text in RECORDS[name] if len(text) < 200]
                    response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "TXT", *texts))
                else:
                    response.set_rcode(dns.rcode.NXDOMAIN)
                await server.sendto(response.to_wire(), sender)

        def local_resolver() -> dns.asyncresolver.Resolver:
            resolver = dns.asyncresolver.Resolver(configure=False)
            resolver.nameservers, resolver.port = ["127.0.0.1"], server.getsockname()[1]
            return resolver

        original = dns.asyncresolver.Resolver
        monkeypatch.setattr(
            dns.asyncresolver, "Resolver", lambda **options: original(**options) if options else (local_resolver())
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with trio.fail_after(10):
                peers = await resolve_bootstrap(["/dnsaddr/one.example.org"])
                assert {peer.peer_id: set(peer.addresses) for peer in peers} == {
                    PEER: {"/ip4/44.0.0.1/tcp/4001", "/ip6/2001:db8::1/tcp/4001"},
                    RSA_PEER: {"/ip4/44.0.0.9/tcp/4001"},
                }
                with pytest.raises(UnreachableError, match="DNS does not tell of nowhere"):
                    await resolve_txt("nowhere.example.org")
            nursery.cancel_scope.cancel()


def test_what_is_a_bootstrap_peer() -> None:
    for fine in (ADDRESS, f"/dns4/a.example.org/tcp/1/p2p/{RSA_PEER}", *PUBLIC_BOOTSTRAP, "/dnsaddr/a.org/p2p/" + PEER):
        check_bootstrap(fine)
    for wrong, complaint in (
        ("/dnsaddr/", "is no domain's"),
        ("/dnsaddr/no domain", "is no domain's"),
        ("/dnsaddr/a.org/garbage/p2p/zz", "is no domain's"),
        ("/ip4/1.2.3.4/tcp/1", "ends in a peer id"),
        (f"/ip4/1.2.3.4/udp/1/p2p/{PEER}", "no TCP address"),
        ("example.org", "neither /dnsaddr/<domain> nor an address"),
    ):
        with pytest.raises(UsageError, match=complaint):
            check_bootstrap(wrong)


def test_which_are_chosen() -> None:
    def chosen(given: Sequence[str] | None = None, mesh: str = "m", **how: bool) -> tuple[str, ...]:
        return choose_bootstrap(given, mesh=mesh, keyed=how.get("keyed", False), public=True, preset=None)

    assert chosen() == PUBLIC_BOOTSTRAP
    assert chosen([ADDRESS]) == (ADDRESS,)
    assert chosen([]) == ()
    assert chosen(mesh="a.example.org") == (*PUBLIC_BOOTSTRAP, "/dnsaddr/a.example.org")
    assert chosen(mesh="a.example.org", keyed=True) == PUBLIC_BOOTSTRAP
    with pytest.raises(UsageError):
        chosen(["nowhere"])
    assert is_domain("a.org")
    assert not any(map(is_domain, ("", "run", "run.1", "a b.org", ".org", "a..org", "10.0.0.1")))
