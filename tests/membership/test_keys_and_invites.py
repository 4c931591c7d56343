"""Keys, what is derived from them, and invites."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh.errors import AuthenticationError, UsageError
from sparkle_mesh.membership import invite
from sparkle_mesh.membership.invite import Invite, is_invite
from sparkle_mesh.membership.keys import MeshKey, MeshSecrets

KEY = MeshKey(bytes(range(32)))


def test_a_key_survives_its_text_form_and_hexadecimal() -> None:
    assert MeshKey.parse(KEY.to_text()) == KEY
    assert MeshKey.parse("  " + KEY.to_text() + "\n") == KEY
    assert MeshKey.parse(KEY.secret.hex()) == KEY
    assert MeshKey.generate() != MeshKey.generate()


def test_coercion_takes_every_documented_form() -> None:
    assert MeshKey.coerce(None) is None
    for form in (KEY, KEY.secret, bytearray(KEY.secret), KEY.to_text()):
        assert MeshKey.coerce(form) == KEY  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["correct horse battery staple", "", b"short", "sparkle-key-1:!!!!", "z" * 64, 7])
def test_passphrases_and_other_nonsense_are_refused(wrong: object) -> None:
    with pytest.raises(UsageError, match="32"):
        MeshKey.coerce(wrong)  # type: ignore[arg-type]


def test_the_secret_is_not_shown() -> None:
    secrets = MeshSecrets("run", KEY)
    for text in (repr(KEY), str(KEY), repr(secrets)):
        assert KEY.secret.hex() not in text
        assert repr(KEY.secret)[2:-1] not in text


def test_a_key_file_is_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "mesh.key"
    KEY.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert MeshKey.load(path) == KEY
    with pytest.raises(UsageError, match="left as it is"):
        MeshKey.generate().save(path)
    assert MeshKey.load(path) == KEY


def test_key_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        MeshKey.load(tmp_path / "absent")
    with pytest.raises(UsageError, match="cannot be read"):
        MeshKey.load(tmp_path)
    with pytest.raises(UsageError, match="cannot be written"):
        KEY.save(tmp_path / "no" / "such" / "folder")
    exposed = tmp_path / "exposed"
    KEY.save(exposed)
    exposed.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        MeshKey.load(exposed)
    binary = tmp_path / "binary"
    binary.touch(mode=0o600)
    binary.write_bytes(os.urandom(16) + b"\xff")
    with pytest.raises(UsageError, match="text form"):
        MeshKey.load(binary)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(UsageError, match="not a key file"):
        MeshKey.load(pipe)
    phrase = tmp_path / "phrase"
    phrase.touch(mode=0o600)
    phrase.write_text("let me in")
    with pytest.raises(UsageError, match=r"phrase.*passphrases are refused"):
        MeshKey.load(phrase)


def test_identifiers_depend_on_name_and_key_and_differ_by_purpose() -> None:
    meshes = [
        MeshSecrets("a", None),
        MeshSecrets("b", None),
        MeshSecrets("a", KEY),
        MeshSecrets("a", MeshKey(b"k" * 32)),
    ]
    identifiers = [value for mesh in meshes for value in (mesh.mesh_id, mesh.tag, mesh.topic, mesh.proof(b"x"))]
    assert len(set(identifiers)) == len(identifiers)
    again = MeshSecrets("a", KEY)
    assert (again.mesh_id, again.tag, again.topic) == (meshes[2].mesh_id, meshes[2].tag, meshes[2].topic)


def test_derivation_is_fixed() -> None:
    """Processes of different versions must meet: these values never change."""
    assert MeshSecrets("run", None).mesh_id.hex() == "ab473cb5111b0893989762da38ea5193fafe5957582f8a873b994855423d2533"
    assert MeshSecrets("run", KEY).mesh_id.hex() == "e9fdefbb01e421282bf8edc8a70c82b56df8d01839903e715cf30b10c29eeddf"


@pytest.mark.parametrize("name", ["", "x" * 256, "line\nbreak"])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="mesh name"):
        MeshSecrets(name, None)


def test_gossip_unseals_only_under_the_same_key() -> None:
    ours, theirs = MeshSecrets("run", KEY), MeshSecrets("run", MeshKey(b"k" * 32))
    sealed = ours.seal(b"payload")
    assert ours.unseal(sealed) == b"payload"
    assert sealed != ours.seal(b"payload")
    for broken in (sealed[:-1], b"", sealed[:5], bytes([sealed[0] ^ 1]) + sealed[1:]):
        with pytest.raises(AuthenticationError):
            ours.unseal(broken)
    with pytest.raises(AuthenticationError):
        theirs.unseal(sealed)


@given(
    name=st.text(min_size=1, max_size=40),
    keyed=st.booleans(),
    addresses=st.lists(st.text(min_size=1, max_size=60), max_size=5),
)
def test_invites_round_trip(name: str, keyed: bool, addresses: list[str]) -> None:
    founder = "12D3KooWFounder" if keyed else None
    made = Invite(name=name, key=KEY if keyed else None, addresses=tuple(addresses), founder=founder)
    text = made.encode()
    assert "\n" not in text
    assert is_invite(text)
    assert Invite.decode(text + "\n") == made


def test_an_invite_of_before_there_were_founders() -> None:
    """It was made by version 0.1.0."""
    text = (
        "sparkle-invite-1:g6RuYW1lo3J1bqNrZXnEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4"
        "fqWFkZHJlc3Nlc5GzL2lwNC8xMC4wLjAuMS90Y3AvNBU-Jnw"
    )
    assert Invite.decode(text) == Invite(name="run", key=KEY, addresses=("/ip4/10.0.0.1/tcp/4",))


def test_damaged_invites_are_refused_and_never_shown() -> None:
    text = Invite(name="run", key=KEY, addresses=()).encode()
    swapped = [text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :] for at in range(17, len(text))]
    for damaged in (text[:-4], text.replace("invite-1:", "invite-1:*"), "sparkle-invite-1:", text + "A", *swapped):
        with pytest.raises(UsageError, match="cut or mistyped") as caught:
            Invite.decode(damaged)
        assert damaged[20:] not in str(caught.value) or not damaged[20:]
    with pytest.raises(UsageError, match="not an invite"):
        Invite.decode("/ip4/127.0.0.1/tcp/1")
    assert not is_invite("/ip4/127.0.0.1/tcp/1")


@pytest.mark.parametrize("change", [str.capitalize, lambda text: "spaAkle" + text[7:], lambda text: text[1:]])
def test_an_invite_with_a_mistyped_beginning_is_no_name(change: Callable[[str], str]) -> None:
    text = Invite(name="run", key=KEY, addresses=()).encode()
    mistyped = change(text[:17]) + text[17:]
    assert is_invite(mistyped)
    with pytest.raises(UsageError, match="cut or mistyped"):
        Invite.decode(mistyped)
    for name in (
        "sparkle-invites",
        "sparkle invite 1: a mesh",
        "run",
        "x" * 200,
        "/ip4/127.0.0.1/tcp/1/p2p/" + "x" * 50,
    ):
        assert not is_invite(name)


def test_an_invite_of_another_version_is_told_from_a_name() -> None:
    assert is_invite("sparkle-invite-2:abc")
    with pytest.raises(UsageError, match="version '2' and this program reads version 1"):
        Invite.decode("sparkle-invite-2:abc")


def test_an_invite_that_holds_nonsense_is_refused() -> None:
    body = b"\x81\xa4name\x07"
    text = "sparkle-invite-1:" + base64.urlsafe_b64encode(body + invite._checksum(body)).decode().rstrip("=")
    with pytest.raises(UsageError, match="ask for a new one"):
        Invite.decode(text)
