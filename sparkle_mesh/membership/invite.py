"""Invites: one line of text that holds all that is needed to join a mesh."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

import msgspec

from sparkle_mesh import limits, wire
from sparkle_mesh.errors import ProtocolError, UsageError
from sparkle_mesh.membership.keys import MeshKey

_PREFIX = "sparkle-invite-1:"


class _InviteBody(wire.Message, frozen=True):
    name: wire.NameText
    key: wire.Bytes32 | None = None
    addresses: Annotated[tuple[wire.AddressText, ...], msgspec.Meta(max_length=limits.INVITE_ADDRESSES_MAX_COUNT)] = ()


class Invite(msgspec.Struct, frozen=True):
    """A mesh's name, its key if it has one, and addresses (with ``/p2p/…`` tails) of peers to begin with.

    An invite to a keyed mesh holds the key: treat it as a secret.
    """

    name: str
    key: MeshKey | None
    addresses: tuple[str, ...]

    def encode(self) -> str:
        """Return the invite as one line of text."""
        secret = self.key.secret if self.key is not None else None
        body = wire.encode(_InviteBody(name=self.name, key=secret, addresses=self.addresses))
        return _PREFIX + base64.urlsafe_b64encode(body).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Invite:
        """Read what :meth:`encode` wrote.

        Raises
        ------
        UsageError
            If ``text`` is not a whole invite.
        """
        stripped = text.strip()
        if not is_invite(stripped):
            raise UsageError(f"{stripped[:40]!r} is not an invite: those begin with {_PREFIX!r}")
        encoded = stripped.removeprefix(_PREFIX)
        try:
            raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
            body = wire.decode(raw, _InviteBody)
        except (binascii.Error, ValueError, ProtocolError) as error:
            raise UsageError(f"the invite is damaged ({error}); copy the whole line again") from error
        key = MeshKey(body.key) if body.key is not None else None
        return cls(name=body.name, key=key, addresses=body.addresses)


def is_invite(text: str) -> bool:
    """Whether ``text`` looks like an invite rather than an address."""
    return text.strip().startswith(_PREFIX)
