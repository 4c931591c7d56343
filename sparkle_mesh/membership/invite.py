"""Invites: one line of text that holds all that is needed to join a mesh."""

from __future__ import annotations

import base64
import binascii
import re
from hashlib import sha256
from typing import Annotated

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.errors import ProtocolError, UsageError
from sparkle_mesh.membership.keys import MeshKey

_SCHEME = "sparkle-invite-"
_PREFIX = f"{_SCHEME}1:"
_CHECKSUM_BYTES = 4
#: No invite is shorter; names of meshes mostly are.
_LEAST_CHARS = len(_PREFIX) + 16
#: How much of its beginning a text shares with invites if it is one in which a character or two are wrong.
_LIKENESS = 0.75


class _InviteBody(wire.Message, frozen=True):
    name: wire.NameText
    key: wire.Bytes32 | None = None
    addresses: Annotated[tuple[wire.AddressText, ...], msgspec.Meta(max_length=limits.INVITE_ADDRESSES_MAX_COUNT)] = ()
    founder: wire.PeerIdText | None = None


class Invite(msgspec.Struct, frozen=True):
    """A mesh's name, its key if it has one, and addresses (with ``/p2p/…`` tails) of peers to begin with.

    An invite to a keyed mesh holds the key: treat it as a secret. ``founder`` is the peer id of the node that may
    revoke peers of it (:mod:`.revocations`); None if there is none.
    """

    name: str
    key: MeshKey | None
    addresses: tuple[str, ...]
    founder: str | None = None

    def encode(self) -> str:
        """Return the invite as one line of text."""
        secret = self.key.secret if self.key is not None else None
        body = wire.encode(_InviteBody(name=self.name, key=secret, addresses=self.addresses, founder=self.founder))
        return _PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Invite:
        """Read what :meth:`encode` wrote.

        Raises
        ------
        UsageError
            If ``text`` is not a whole invite. The message holds nothing of it: it may be a secret.
        """
        stripped = text.strip()
        if not is_invite(stripped):
            raise UsageError(f"this is not an invite: those begin with {_PREFIX!r}")
        damaged = UsageError(f"the invite ({len(stripped)} characters) is cut or mistyped; copy the whole line again")
        if not stripped.startswith(_SCHEME):
            raise damaged
        if not stripped.startswith(_PREFIX):
            version = stripped.removeprefix(_SCHEME).partition(":")[0]
            if not re.fullmatch(r"[0-9]{1,9}", version):
                raise damaged
            raise UsageError(f"the invite is of version {version!r} and this program reads version 1; update it")
        encoded = stripped.removeprefix(_PREFIX)
        try:
            raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError) as error:
            raise damaged from error
        body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
        if checksum != _checksum(body):
            raise damaged
        try:
            invite = wire.decode(body, _InviteBody)
        except ProtocolError as error:
            raise UsageError("the invite holds what no version of this program writes; ask for a new one") from error
        key = MeshKey(invite.key) if invite.key is not None else None
        return cls(name=invite.name, key=key, addresses=invite.addresses, founder=invite.founder)


def _checksum(body: bytes) -> bytes:
    """Return what tells a mistyped character; it proves nothing."""
    return sha256(b"sparkle invite 1\0" + body).digest()[:_CHECKSUM_BYTES]


def is_invite(text: str) -> bool:
    """Whether ``text`` looks like an invite, be it a mistyped one, rather than like a name or an address."""
    stripped = text.strip()
    if stripped.startswith(_SCHEME):
        return True
    if len(stripped) < _LEAST_CHARS:
        return False
    from difflib import SequenceMatcher  # not at start-up: few programs have names that long

    # A long text that begins nearly so: it must not be shown, nor be taken for the name of a mesh.
    start = stripped[: len(_PREFIX)].lower()
    return SequenceMatcher(None, start, _PREFIX).ratio() >= _LIKENESS
