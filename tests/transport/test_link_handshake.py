"""The link handshake: golden messages, fixed keys, and peers that do not keep to it."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits, wire
from sparkle_mesh.clock import SYSTEM_ENTROPY
from sparkle_mesh.errors import AuthenticationError, LinkRefusedError, ProtocolError, VersionError
from sparkle_mesh.transport.ciphers import AES_256_GCM, CHACHA20_POLY1305
from sparkle_mesh.transport.handshake import (
    MAGIC,
    LinkAnswer,
    LinkKeys,
    LinkOffer,
    LinkOverStream,
    LinkParty,
    LinkRefusal,
    LinkUpgrade,
    PendingLinks,
    StreamKeys,
    decode_last_word,
    decode_offer,
    decode_reply,
    derive_keys,
)
from tests.entropies import FixedEntropy

GOLDEN = Path(__file__).parent / "golden"
OFFER = LinkOffer(
    version=1,
    mesh_id=b"m" * 32,
    link_id=b"l" * 16,
    secret=b"s" * 32,
    ciphers=(AES_256_GCM, CHACHA20_POLY1305),
    streams=2,
    host_id=b"h" * 16,
    addresses=("/ip4/192.168.1.4/tcp/45654", "/ip6/::1/tcp/1"),
)
ANSWER = LinkAnswer(
    version=1, secret=b"S" * 32, cipher=AES_256_GCM, streams=2, host_id=b"H" * 16, addresses=("/ip4/10.0.0.1/tcp/9",)
)
REFUSAL = LinkRefusal(version=1, reason="the peer is closing")
UPGRADE = LinkUpgrade(**{**msgspec.structs.asdict(OFFER), "kinds": ("tcp",)}, moves=b"f" * 16)
OVER_STREAM = LinkOverStream(version=1)
MESSAGES = {
    "offer.1": OFFER,
    "answer.1": ANSWER,
    "refusal.1": REFUSAL,
    "upgrade.1": UPGRADE,
    "over_stream.1": OVER_STREAM,
}
DECODERS = {
    "offer.1": decode_offer,
    "answer.1": decode_reply,
    "refusal.1": decode_last_word,
    "upgrade.1": decode_offer,
    "over_stream.1": decode_last_word,
}


def party(peer_id: str, **changes: object) -> LinkParty:
    base = LinkParty(peer_id, b"m" * 32, peer_id[0].encode() * 16, (AES_256_GCM, CHACHA20_POLY1305))
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def keys(link_id: bytes = b"l" * 16, streams: int = 1) -> LinkKeys:
    return LinkKeys(link_id, AES_256_GCM, (StreamKeys(b"1" * 32, b"2" * 32),) * streams, b"o" * 32, b"w" * 32)


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_messages_decode_and_stay_the_same(name: str) -> None:
    golden = (GOLDEN / f"{name}.msgpack").read_bytes()
    assert DECODERS[name](golden) == MESSAGES[name]
    newer = GOLDEN / f"{name.replace('.1', '.2')}.msgpack"
    assert wire.encode(MESSAGES[name]) == (newer.read_bytes() if newer.exists() else golden)
    assert DECODERS[name](wire.encode(MESSAGES[name])) == MESSAGES[name]


def test_golden_opening_and_welcome() -> None:
    assert keys().opening(3) == (GOLDEN / "opening.1.bin").read_bytes()
    assert keys().welcome(3) == (GOLDEN / "welcome.1.bin").read_bytes()


def test_keys_are_hkdf_over_both_secrets_and_the_transcript() -> None:
    made = derive_keys(OFFER, ANSWER, dialer="A", answerer="B")
    transcript = hashlib.sha256()
    for part in (b"sparkle link", b"\0\0\0\1", b"aes-256-gcm", b"\0\0\0\2", b"m" * 32, b"l" * 16, b"A", b"B"):
        transcript.update(len(part).to_bytes(4, "big") + part)
    # RFC 5869, written out.
    extracted = hmac.digest(b"sparkle link 1", b"s" * 32 + b"S" * 32, "sha256")
    blocks = [b""]
    for number in range(1, 7):
        blocks.append(hmac.digest(extracted, blocks[-1] + transcript.digest() + bytes([number]), "sha256"))
    assert [made.opening_key, made.welcome_key] == blocks[1:3]
    assert made.streams == (StreamKeys(*blocks[3:5]), StreamKeys(*blocks[5:7]))
    assert made.opening_key.hex() == "78ceb4ce6e487f41884f09839c6eb0847f97d845cdede0c95aec7a1975280543"


def test_every_part_of_the_transcript_changes_every_key() -> None:
    replace = msgspec.structs.replace
    variants = [
        derive_keys(OFFER, ANSWER, dialer="A", answerer="B"),
        derive_keys(replace(OFFER, mesh_id=b"M" * 32), ANSWER, dialer="A", answerer="B"),
        derive_keys(replace(OFFER, link_id=b"L" * 16), ANSWER, dialer="A", answerer="B"),
        derive_keys(replace(OFFER, secret=b"z" * 32), ANSWER, dialer="A", answerer="B"),
        derive_keys(OFFER, replace(ANSWER, secret=b"z" * 32), dialer="A", answerer="B"),
        derive_keys(OFFER, replace(ANSWER, cipher=CHACHA20_POLY1305), dialer="A", answerer="B"),
        derive_keys(OFFER, ANSWER, dialer="B", answerer="A"),
        derive_keys(OFFER, ANSWER, dialer="AB", answerer=""),
        derive_keys(OFFER, ANSWER, dialer="A", answerer="C"),
    ]
    drawn = [
        key
        for made in variants
        for key in (
            made.opening_key,
            made.welcome_key,
            *(key for pair in made.streams for key in (pair.dialer_to_answerer, pair.answerer_to_dialer)),
        )
    ]
    assert len(set(drawn)) == len(drawn) == 6 * len(variants)


def test_both_sides_come_to_the_same_keys() -> None:
    entropy = FixedEntropy()
    dialer, answerer = party("A"), party("B")
    offer = dialer.offer(("/ip4/1.2.3.4/tcp/5",), entropy)
    answer, theirs = answerer.answer(decode_offer(wire.encode(offer)), "A", ("/ip4/5.6.7.8/tcp/5",) * 40, entropy)
    mine = dialer.accept(offer, decode_reply(wire.encode(answer)), "B")
    assert mine == theirs
    assert (mine.link_id, mine.cipher, len(mine.streams)) == (offer.link_id, AES_256_GCM, 1)
    assert len({offer.link_id[:16], offer.secret[:16], answer.secret[:16]}) == 3
    assert len(answer.addresses) == limits.ADDRESSES_PER_PEER_MAX_COUNT
    mine.check_welcome(0, theirs.welcome(0))
    with pytest.raises(AuthenticationError):
        mine.check_welcome(0, theirs.welcome(1))


def test_secrets_show_in_no_repr() -> None:
    made = derive_keys(OFFER, ANSWER, dialer="A", answerer="B")
    shown = repr((OFFER, ANSWER, made, made.streams))
    for secret in (OFFER.secret, ANSWER.secret, made.opening_key, made.streams[0].dialer_to_answerer):
        assert repr(secret) not in shown
        assert secret.hex() not in shown


def test_refusals() -> None:
    entropy = FixedEntropy()
    with pytest.raises(LinkRefusedError, match="different meshes"):
        party("B", mesh_id=b"x" * 32).answer(OFFER, "A", (), entropy)
    with pytest.raises(LinkRefusedError, match=r"peer A has rot13, peer B .*aes-256-gcm"):
        party("B").answer(msgspec.structs.replace(OFFER, ciphers=("rot13",)), "A", (), entropy)
    elsewhere = msgspec.structs.replace(OFFER, kinds=("shared_memory",), host_id=b"y" * len(OFFER.host_id))
    with pytest.raises(LinkRefusedError, match=r"peer A has shared_memory, peer B .*tcp.* not on one host"):
        party("B").answer(elsewhere, "A", (), entropy)
    with pytest.raises(LinkRefusedError, match="the peer is closing"):
        decode_reply(wire.encode(REFUSAL))


def test_an_answer_must_be_among_what_was_offered() -> None:
    with pytest.raises(ProtocolError, match="rot13"):
        party("A").accept(OFFER, msgspec.structs.replace(ANSWER, cipher="rot13"), "B")
    with pytest.raises(ProtocolError, match="3 streams"):
        party("A").accept(OFFER, msgspec.structs.replace(ANSWER, streams=3), "B")


@pytest.mark.parametrize(("version", "who"), [(0, "the peer"), (2, "this process"), (99, "this process")])
@pytest.mark.parametrize("name", MESSAGES)
def test_another_version_is_told_so(name: str, version: int, who: str) -> None:
    # Of a future version nothing is known but that it has a type and a version.
    kind = name.partition(".")[0]
    data = msgspec.msgpack.encode({"type": kind, "version": version, "other": [1, 2], "secret": 5})
    for decode in (DECODERS[name], decode_reply if name != "offer.1" else decode_offer):
        with pytest.raises(VersionError, match=f"version {version} .* upgrade {who}"):
            decode(data)


@pytest.mark.parametrize("name", MESSAGES)
@given(st.data())
def test_mutated_messages_raise_nothing_but_protocol_errors(name: str, data: st.DataObject) -> None:
    golden = bytearray((GOLDEN / f"{name}.msgpack").read_bytes())
    start = data.draw(st.integers(0, len(golden)))
    golden[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    for decode in DECODERS.values():
        try:
            decode(bytes(golden))
        except (ProtocolError, LinkRefusedError):
            continue


@given(st.binary(max_size=200))
def test_garbage_raises_nothing_but_protocol_errors(data: bytes) -> None:
    for decode in DECODERS.values():
        with pytest.raises(ProtocolError):
            decode(data)


def test_oversize_messages_are_refused() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        decode_offer(bytes(limits.LINK_HANDSHAKE_MAX_BYTES + 1))


# --- Openings ------------------------------------------------------------------------------------


def pending(*all_keys: LinkKeys, now: float = 0.0) -> PendingLinks:
    table = PendingLinks()
    for made in all_keys:
        table.add(made, "A", now)
    return table


def test_a_stream_opens_once() -> None:
    table = pending(keys(streams=2))
    for number in (1, 0):
        assert table.open(keys().opening(number, 2), 1.0) == (keys(streams=2), number, 2)
        with pytest.raises(AuthenticationError, match="nobody expects"):
            table.open(keys().opening(number, 2), 1.0)
    assert len(table) == 0


def test_a_wrong_proof_does_not_use_up_the_place() -> None:
    table = pending(keys())
    wrong = bytearray(keys().opening(0))
    wrong[-1] ^= 1
    with pytest.raises(AuthenticationError, match="wrong proof"):
        table.open(wrong, 0.0)
    assert table.open(bytearray(keys().opening(0)), 0.0)[1] == 0


@pytest.mark.parametrize(
    "opening",
    [keys(b"x" * 16).opening(0), keys().opening(1), keys().opening(2**31), keys().opening(0)[:31] + b"\1" + b"0" * 32],
)
def test_what_is_not_expected_is_refused(opening: bytes) -> None:
    with pytest.raises(AuthenticationError, match="nobody expects"):
        pending(keys()).open(opening, 0.0)


@pytest.mark.parametrize("opening", [b"", MAGIC, keys().opening(0)[:-1], keys().opening(0) + b"x", bytes(64)])
def test_what_is_no_opening_is_refused(opening: bytes) -> None:
    with pytest.raises(ProtocolError, match="not the opening"):
        pending(keys()).open(opening, 0.0)


@given(st.integers(0, 63), st.integers(1, 255))
def test_mutated_openings_never_open(position: int, change: int) -> None:
    opening = bytearray(keys().opening(0))
    opening[position] ^= change
    with pytest.raises(ProtocolError):
        pending(keys()).open(opening, 0.0)


def test_pending_links_expire() -> None:
    table = pending(keys(), now=100.0)
    with pytest.raises(AuthenticationError):
        table.open(keys().opening(0), 100.0 + limits.LINK_HANDSHAKE_TIMEOUT_S)
    assert len(table) == 0


def test_pending_links_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    table = PendingLinks()
    ids = iter(range(10_000))

    def add(peer_id: str, now: float = 0.0) -> None:
        table.add(keys(next(ids).to_bytes(16, "big")), peer_id, now)

    for _ in range(limits.LINK_PENDING_PER_PEER_MAX_COUNT):
        add("A")
    with pytest.raises(LinkRefusedError, match="of this peer 4"):
        add("A")
    monkeypatch.setattr(limits, "LINK_PENDING_MAX_COUNT", 6)
    add("B")
    add("C")
    with pytest.raises(LinkRefusedError, match="too many"):
        add("D")
    # Time frees the places.
    add("D", now=limits.LINK_HANDSHAKE_TIMEOUT_S)
    assert len(table) == 1


def test_a_link_id_in_use_is_refused_and_can_be_given_up() -> None:
    table = pending(keys())
    with pytest.raises(LinkRefusedError, match="in use"):
        table.add(keys(), "A", 0.0)
    table.discard(keys().link_id)
    table.discard(keys().link_id)
    assert len(table) == 0


def test_the_dialer_chooses_how_many_streams_and_keeps_to_it() -> None:
    table = pending(keys(streams=4))
    assert table.open(keys().opening(2, 3), 0.0)[1:] == (2, 3)
    with pytest.raises(ProtocolError, match="of 2 was opened where the one before was of 3"):
        table.open(keys().opening(0, 2), 0.0)
    for wrong in (keys().opening(3, 3), keys().opening(0, 5), keys().opening(4, 5)):
        with pytest.raises(AuthenticationError, match="nobody expects"):
            table.open(wrong, 0.0)
    assert table.open(keys().opening(0, 3), 0.0)[1:] == (0, 3)
    assert table.open(keys().opening(1, 3), 0.0)[1:] == (1, 3)
    assert not len(table)
    # Fewer than were agreed on are as good.
    assert pending(keys(streams=4)).open(keys().opening(0), 0.0)[1:] == (0, 1)


def test_streams_are_what_both_sides_can() -> None:
    ours = LinkParty("A", b"m" * 32, b"h" * 16, (AES_256_GCM,), streams=5)
    theirs = LinkParty("B", b"m" * 32, b"h" * 16, (AES_256_GCM,), streams=3)
    for dialer, answerer in ((ours, theirs), (theirs, ours)):
        offer = dialer.offer((), SYSTEM_ENTROPY)
        assert offer.streams == dialer.streams
        answer, derived = answerer.answer(offer, dialer.peer_id, (), SYSTEM_ENTROPY)
        assert answer.streams == len(derived.streams) == 3
        assert dialer.accept(offer, answer, answerer.peer_id) == derived
