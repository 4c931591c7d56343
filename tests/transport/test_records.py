"""The record layer: fixed vectors, and everything a hostile network can do to records."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.errors import AuthenticationError, ProtocolError
from sparkle_mesh.transport import ciphers
from sparkle_mesh.transport.ciphers import (
    AEGIS_128L,
    AES_256_GCM,
    CHACHA20_POLY1305,
    choose_cipher,
    preferred_ciphers,
)
from sparkle_mesh.transport.records import PLACE, RecordOpener, RecordSealer, parse_prefix

KEY = bytes(range(32))
CIPHERS = [AEGIS_128L, AES_256_GCM, CHACHA20_POLY1305]
VECTORS = {
    AEGIS_128L: [
        "0200000033c034985741c025a7f604c7023fecf9d88258263027884ef989b16bc48a6c79",
        "020000073d787d0eb43baa7a43d22309db73d27016acbd25aff11705ebd6ff163fd26092c74a03c844f64a",
        "02000009853d5c6553cdbbb43709717e47bd372a4abc7c441d70efb41375476ea76370095cc829635dd3ac03c7",
    ],
    AES_256_GCM: [
        "02000000ac1f21917d4362ab5dfced12cd38ec4b",
        "0200000766a6de8e2f9855cf244001ae39ce2e4c80b55afc820c7b",
        "0200000943dd51ed52b133a7663cac18c725244fd044d6fc580755f292",
    ],
    CHACHA20_POLY1305: [
        "02000000fc8840702364d9a19758eba260a00564",
        "020000071a2c1dab5a66ddf6b1729f4766c8cdb30eb360693b5a3f",
        "020000092837b99bd73d94c6dc4cca4a25bc0edc6c30102c5d557f05f2",
    ],
}


def seal(sealer: RecordSealer, plaintext: bytes, kind: int = 2) -> bytes:
    out = bytearray(len(plaintext) + sealer.overhead_bytes)
    assert sealer.seal_into(kind, plaintext, memoryview(out)) == len(out)
    return bytes(out)


def open_record(opener: RecordOpener, record: bytes) -> bytes:
    out = bytearray(max(0, len(record) - opener.overhead_bytes))
    opener.open_into(memoryview(record), memoryview(out))
    return bytes(out)


def pair(cipher: str = AES_256_GCM) -> tuple[RecordSealer, RecordOpener]:
    return RecordSealer(cipher, KEY), RecordOpener(cipher, KEY)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_vectors(cipher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The third record comes after a change of keys.
    monkeypatch.setattr(limits, "REKEY_INTERVAL_RECORDS", 2)
    sealer, opener = pair(cipher)
    plaintexts = [b"", b"sparkle", b"a new key"]
    assert [seal(sealer, plaintext).hex() for plaintext in plaintexts] == VECTORS[cipher]
    assert [open_record(opener, bytes.fromhex(vector)) for vector in VECTORS[cipher]] == plaintexts


@pytest.mark.parametrize(("cipher", "aead"), [(AES_256_GCM, AESGCM), (CHACHA20_POLY1305, ChaCha20Poly1305)])
def test_a_record_is_what_the_cipher_makes_of_it(cipher: str, aead: type[AESGCM]) -> None:
    sealer, _ = pair(cipher)
    first, second = seal(sealer, b"one", kind=1), seal(sealer, b"second", kind=255)
    assert first == b"\x01\0\0\x03" + aead(KEY).encrypt(bytes(12), b"one", b"\x01\0\0\x03")
    assert second == b"\xff\0\0\x06" + aead(KEY).encrypt(bytes(11) + b"\x01", b"second", b"\xff\0\0\x06")


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 65536, limits.RECORD_MAX_BYTES])
def test_round_trip(cipher: str, size: int) -> None:
    sealer, opener = pair(cipher)
    for fill in (b"a", b"b"):
        record = seal(sealer, fill * size)
        assert parse_prefix(record[:4]) == (2, size)
        assert open_record(opener, record) == fill * size


def test_a_record_may_be_sealed_in_place() -> None:
    sealer, opener = pair()
    buffer = memoryview(bytearray(b"1234" + b"in place" * 100 + bytes(16)))
    sealer.seal_into(1, buffer[4:-16], buffer)
    assert open_record(opener, bytes(buffer)) == b"in place" * 100


def refuses(opener: RecordOpener, record: bytes) -> None:
    with pytest.raises(AuthenticationError):
        open_record(opener, record)


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("position", [0, 1, 2, 3, 4, 10, -17, -16, -1])
def test_forged(cipher: str, position: int) -> None:
    sealer, opener = pair(cipher)
    record = bytearray(seal(sealer, b"x" * 20))
    record[position] ^= 1
    refuses(opener, bytes(record))


def test_truncated() -> None:
    sealer, opener = pair()
    refuses(opener, seal(sealer, b"x" * 20)[:-1])


@pytest.mark.parametrize("length", [0, 3, 19])
def test_shorter_than_a_record(length: int) -> None:
    refuses(pair()[1], bytes(length))


def test_replayed() -> None:
    sealer, opener = pair()
    record = seal(sealer, b"once")
    open_record(opener, record)
    refuses(opener, record)


def test_reordered() -> None:
    sealer, opener = pair()
    _, second = seal(sealer, b"same"), seal(sealer, b"same")
    refuses(opener, second)


def test_left_out() -> None:
    sealer, opener = pair()
    first, _, third = (seal(sealer, b"same") for _ in range(3))
    open_record(opener, first)
    refuses(opener, third)


def test_reflected() -> None:
    # Each direction has a key of its own; a record sent back to its sender is under the wrong one.
    sealer, opener = RecordSealer(AES_256_GCM, b"t" * 32), RecordOpener(AES_256_GCM, b"b" * 32)
    refuses(opener, seal(sealer, b"mirror"))


def test_wrong_cipher() -> None:
    refuses(RecordOpener(CHACHA20_POLY1305, KEY), seal(RecordSealer(AES_256_GCM, KEY), b"x"))


@pytest.mark.parametrize("cipher", CIPHERS)
def test_an_error_keeps_no_buffer(cipher: str) -> None:
    # In a cycle with the error's traceback, a memoryview that is still exported crashes CPython's collector.
    sealer, opener = pair(cipher)
    record, out = memoryview(bytearray(seal(sealer, b"plain"))), memoryview(bytearray(5))
    record[-1] ^= 1
    with pytest.raises(AuthenticationError) as caught:
        opener.open_into(record, out)
    assert caught.tb is not None
    out.release()
    record.release()


def test_nothing_opens_after_an_error() -> None:
    sealer, opener = pair()
    good = seal(sealer, b"good")
    refuses(opener, b"\0" * len(good))
    with pytest.raises(AuthenticationError, match="before"):
        open_record(opener, good)


def test_keys_change_and_old_ones_do_not_open_new_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REKEY_INTERVAL_RECORDS", 3)
    sealer, opener = pair()
    sealed = [seal(sealer, bytes([number])) for number in range(10)]
    assert [open_record(opener, record) for record in sealed] == [bytes([number]) for number in range(10)]
    for number in (2, 3, 9):
        nonce = number.to_bytes(12, "big")
        under_first_key = AESGCM(KEY).encrypt(nonce, bytes([number]), sealed[number][:4])
        assert (under_first_key == sealed[number][4:]) == (number < 3)


def test_keys_change_at_the_documented_interval() -> None:
    assert limits.REKEY_INTERVAL_RECORDS == 2**16
    sealer = RecordSealer(AES_256_GCM, KEY)
    out = memoryview(bytearray(sealer.overhead_bytes))
    for number in range(2**16 + 1):
        sealer.seal_into(1, b"", out)
        if number >= 2**16 - 1:
            first_key = AESGCM(KEY).encrypt(number.to_bytes(12, "big"), b"", bytes(out[:4]))
            assert (bytes(out[4:]) == first_key) == (number < 2**16)


def test_bounds() -> None:
    sealer, _ = pair()
    with pytest.raises(ValueError, match="at most"):
        seal(sealer, bytes(limits.RECORD_MAX_BYTES + 1))
    with pytest.raises(ValueError, match="32 bytes"):
        RecordSealer(AES_256_GCM, b"short")
    with pytest.raises(ProtocolError, match=str(limits.RECORD_MAX_BYTES + 1)):
        parse_prefix((1 << 24 | limits.RECORD_MAX_BYTES + 1).to_bytes(4, "big"))


@given(st.integers(0, 60), st.binary(max_size=8), st.integers(0, 60))
def test_mutations_never_open(start: int, new: bytes, count: int) -> None:
    sealer, opener = pair()
    record = seal(sealer, b"some plaintext of forty bytes or nearly.")
    changed = record[:start] + new + record[start + count :]
    if changed != record:
        refuses(opener, changed)


def test_the_cipher_is_the_same_from_both_sides() -> None:
    lists = [
        (AES_256_GCM, CHACHA20_POLY1305),
        (CHACHA20_POLY1305, AES_256_GCM),
        (AES_256_GCM,),
        (CHACHA20_POLY1305,),
        (AEGIS_128L, AES_256_GCM, CHACHA20_POLY1305),
    ]
    for mine in lists:
        for theirs in lists:
            assert choose_cipher(mine, theirs) == choose_cipher(theirs, mine)
    assert choose_cipher(lists[0], lists[0]) == AES_256_GCM
    assert choose_cipher(lists[0], lists[1]) == CHACHA20_POLY1305
    assert choose_cipher(lists[1], lists[2]) == AES_256_GCM
    assert choose_cipher(lists[2], lists[3]) is None
    assert choose_cipher(lists[4], lists[4]) == AEGIS_128L
    assert choose_cipher(lists[4], lists[0]) == AES_256_GCM
    assert choose_cipher(lists[4], lists[1]) == CHACHA20_POLY1305
    assert choose_cipher(("rot13", AES_256_GCM), ("rot13", AES_256_GCM)) == AES_256_GCM


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu aes vaes\n", AEGIS_128L),
        ("Features\t: fp asimd aes sha2\n", AEGIS_128L),
        ("flags\t\t: fpu sse2\nmodel name : aes aes\n", CHACHA20_POLY1305),
    ],
)
def test_preference_follows_the_processor(
    cpuinfo: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo, encoding="ascii")
    monkeypatch.setattr(ciphers, "_CPUINFO", path)
    assert preferred_ciphers()[0] == expected
    assert {AES_256_GCM, CHACHA20_POLY1305} <= set(preferred_ciphers())


def test_without_libsodium_there_is_no_aegis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("flags : aes\n", encoding="ascii")
    monkeypatch.setattr(ciphers, "_CPUINFO", path)
    monkeypatch.setattr(ciphers, "find_spec", lambda name: None)
    assert preferred_ciphers() == (AES_256_GCM, CHACHA20_POLY1305)


def test_aegis_is_libsodiums() -> None:
    from nacl.bindings import crypto_aead_aegis128l_encrypt

    out = bytearray(5 + 32)
    ciphers.make_cipher(AEGIS_128L, KEY).encrypt_into(7, b"plain", b"data", out)
    assert bytes(out) == crypto_aead_aegis128l_encrypt(b"plain", b"data", (7).to_bytes(16, "big"), KEY[:16])


def test_aegis_checks_the_sizes_of_buffers() -> None:
    cipher = ciphers.make_cipher(AEGIS_128L, KEY)
    with pytest.raises(ValueError, match="37 bytes"):
        cipher.encrypt_into(0, b"plain", b"", bytearray(36))
    with pytest.raises(InvalidTag):
        cipher.decrypt_into(0, bytes(31), b"", bytearray(0))


@pytest.mark.parametrize(("machine", "expected"), [("AMD64", AEGIS_128L), ("riscv64", CHACHA20_POLY1305)])
def test_preference_without_cpuinfo(
    machine: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ciphers, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert preferred_ciphers()[0] == expected


# --- Extended prefixes ---------------------------------------------------------------------------


def placed_pair(cipher: str = AES_256_GCM) -> tuple[RecordSealer, RecordOpener]:
    return RecordSealer(cipher, KEY, placed=True), RecordOpener(cipher, KEY, placed=True)


def seal_placed(sealer: RecordSealer, plaintext: bytes, number: int, offset: int) -> bytes:
    out = bytearray(len(plaintext) + sealer.overhead_bytes)
    assert sealer.seal_into(4, plaintext, memoryview(out), PLACE.pack(number, offset)) == len(out)
    return bytes(out)


@pytest.mark.parametrize(("cipher", "aead"), [(AES_256_GCM, AESGCM), (CHACHA20_POLY1305, ChaCha20Poly1305)])
def test_a_place_is_authenticated_and_not_encrypted(cipher: str, aead: type[AESGCM]) -> None:
    sealer, opener = placed_pair(cipher)
    record = seal_placed(sealer, b"stripe", 5, 2**40)
    prefix = bytes.fromhex("0400000600000000000000050000010000000000")
    assert record == prefix + aead(KEY).encrypt(bytes(12), b"stripe", prefix)
    assert open_record(opener, record) == b"stripe"


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("position", range(20))
def test_a_forged_place(cipher: str, position: int) -> None:
    sealer, opener = placed_pair(cipher)
    record = bytearray(seal_placed(sealer, b"x" * 20, 1, 65536))
    record[position] ^= 1
    refuses(opener, bytes(record))


def test_prefixes_are_extended_always_or_never() -> None:
    plain, placed = pair(), placed_pair()
    with pytest.raises(ValueError, match="structures"):
        seal(placed[0], b"no place")
    with pytest.raises(ValueError, match="structures"):
        seal_placed(plain[0], b"a place too many", 0, 0)
    refuses(pair()[1], seal_placed(placed_pair()[0], b"x", 0, 0))
    refuses(placed_pair()[1], seal(pair()[0], b"x" * 20))


@given(st.integers(0, 60), st.binary(max_size=8), st.integers(0, 60))
def test_mutations_of_placed_records_never_open(start: int, new: bytes, count: int) -> None:
    sealer, opener = placed_pair()
    record = seal_placed(sealer, b"some plaintext of forty bytes or nearly.", 7, 65536)
    changed = record[:start] + new + record[start + count :]
    if changed != record:
        refuses(opener, changed)
