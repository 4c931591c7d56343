"""How two peers agree on the keys of a direct link. Pure: messages and bytes in, messages, bytes and keys out.

Nomenclature: the *dialer* opens a control-plane stream to the *answerer*, whose identities the control plane has
authenticated and whose contents it keeps secret, and sends a :class:`LinkOffer`; the answerer replies with a
:class:`LinkAnswer` (or a :class:`LinkRefusal`). Each brings 32 fresh random bytes; HKDF-SHA256 over both, bound to
everything that was agreed (the *transcript*), yields the keys. The dialer then connects to one of the answerer's
addresses and sends an *opening*: 64 bytes that name the link and prove the keys. The answerer replies with a
*welcome*, 32 bytes that prove them in turn, and records follow.

Offer and answer agree on how many data streams there may be, and keys are made for all of them. How many there are is
the dialer's choice when it has seen how long the way is, and stands in every opening.

The transcript covers both peer ids, so that keys cannot be made to count for another pair; the mesh id, so that a
link of one mesh cannot serve another; version and cipher, so that nobody can talk the two into weaker ones.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, TypeAlias

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sparkle_mesh import limits, wire
from sparkle_mesh.clock import Entropy
from sparkle_mesh.errors import AuthenticationError, LinkRefusedError, ProtocolError, VersionError
from sparkle_mesh.transport.ciphers import KEY_BYTES, choose_cipher

LINK_VERSION: Final = 1
#: Every kind of link between processes, the best first.
SHARED_MEMORY: Final = "shared_memory"
TCP: Final = "tcp"
LIBP2P_STREAM: Final = "libp2p_stream"
LINK_KINDS: Final = (SHARED_MEMORY, TCP, LIBP2P_STREAM)
MAGIC: Final = b"SPRKLNK1"
OPENING_BYTES: Final = 64
WELCOME_BYTES: Final = 32
_LINK_ID_BYTES: Final = 16
_PROOF_BYTES: Final = 32
# How many streams will be opened beside the first, and which this one is.
_WHICH_STREAM: Final = struct.Struct(">II")

CipherList = Annotated[
    tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=32)], ...],
    msgspec.Meta(min_length=1, max_length=limits.LINK_CIPHERS_MAX_COUNT),
]
StreamCount = Annotated[int, msgspec.Meta(ge=1, le=limits.LINK_STREAMS_MAX_COUNT)]
KindList = Annotated[
    tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=32)], ...],
    msgspec.Meta(max_length=limits.LINK_KINDS_MAX_COUNT),
]


class LinkOffer(wire.Message, frozen=True, kw_only=True, tag="offer"):
    """The dialer's first message. ``ciphers`` and ``kinds`` (of links) in its order of preference."""

    version: wire.Count
    mesh_id: wire.Bytes32
    link_id: wire.Bytes16
    secret: wire.Bytes32
    ciphers: CipherList
    streams: StreamCount = 1
    host_id: wire.Bytes16
    addresses: wire.AddressList = ()
    kinds: KindList = ("tcp",)

    def __repr__(self) -> str:
        return f"<LinkOffer {self.link_id.hex()} version {self.version}>"


class LinkUpgrade(LinkOffer, frozen=True, kw_only=True, tag="upgrade"):
    """An offer of a direct connection to which a link that goes over the control plane is to move: the one that the
    offer with the link id ``moves`` made. Either side of that link may offer it."""

    moves: wire.Bytes16


class LinkAnswer(wire.Message, frozen=True, kw_only=True, tag="answer"):
    """The answerer's reply: what was chosen, and where to connect to.

    ``kinds`` are those of the offer that the answerer can do too, in the dialer's order: it takes the first that
    works. ``local_address`` is of a Unix-domain socket, for shared memory.
    """

    version: wire.Count
    secret: wire.Bytes32
    cipher: Annotated[str, msgspec.Meta(min_length=1, max_length=32)]
    streams: StreamCount = 1
    host_id: wire.Bytes16
    addresses: wire.AddressList = ()
    kinds: KindList = ("tcp",)
    local_address: wire.NameText = ""

    def __repr__(self) -> str:
        return f"<LinkAnswer {self.cipher} version {self.version}>"


class LinkRefusal(wire.Message, frozen=True, kw_only=True, tag="refusal"):
    """Either side's last message: why there will be no link. ``version`` is the sender's."""

    version: wire.Count
    reason: wire.ReasonText


class LinkOverStream(wire.Message, frozen=True, kw_only=True, tag="over_stream"):
    """The dialer's last message where no other kind of link came about: from here on, the control-plane stream that
    the handshake went over is the link. The answerer says it back, and the link begins."""

    version: wire.Count


class _AnyVersion(wire.Message, frozen=True, kw_only=True):
    """What every version of every handshake message has."""

    type: Annotated[str, msgspec.Meta(max_length=32)]
    version: wire.Count


LinkReply: TypeAlias = LinkAnswer | LinkRefusal


def _check_version(data: bytes | bytearray | memoryview) -> str:
    """Return the type of the message in ``data``, once its version is known to be this one."""
    message = wire.decode(data, _AnyVersion, max_bytes=limits.LINK_HANDSHAKE_MAX_BYTES)
    version = message.version
    if version != LINK_VERSION:
        raise VersionError(
            f"the peer speaks version {version} of the link protocol and this process version {LINK_VERSION}; "
            f"upgrade {'this process' if version > LINK_VERSION else 'the peer'}"
        )
    return message.type


def decode_offer(data: bytes | bytearray | memoryview) -> LinkOffer:
    """Return the offer in ``data``, which may be a :class:`LinkUpgrade`.

    Raises
    ------
    VersionError
        If it is of another version.
    ProtocolError
        If it is none.
    """
    if _check_version(data) == "upgrade":
        return wire.decode(data, LinkUpgrade, max_bytes=limits.LINK_HANDSHAKE_MAX_BYTES)
    return wire.decode(data, LinkOffer, max_bytes=limits.LINK_HANDSHAKE_MAX_BYTES)


def decode_reply(data: bytes | bytearray | memoryview) -> LinkAnswer:
    """Return the answer in ``data``. Errors as :func:`decode_offer`, and LinkRefusedError with the peer's reason."""
    if _check_version(data) == "refusal":
        refusal = wire.decode(data, LinkRefusal, max_bytes=limits.LINK_HANDSHAKE_MAX_BYTES)
        raise LinkRefusedError(f"the peer refused the link: {refusal.reason}")
    return wire.decode(data, LinkAnswer, max_bytes=limits.LINK_HANDSHAKE_MAX_BYTES)


def decode_last_word(data: bytes | bytearray | memoryview) -> LinkRefusal | LinkOverStream:
    """Return what either side says after an answer. Errors as :func:`decode_offer`."""
    if _check_version(data) == "over_stream":
        return wire.decode(data, LinkOverStream, max_bytes=limits.LINK_HANDSHAKE_MAX_BYTES)
    return wire.decode(data, LinkRefusal, max_bytes=limits.LINK_HANDSHAKE_MAX_BYTES)


@dataclass(frozen=True, slots=True)
class StreamKeys:
    """The record keys of one data stream."""

    dialer_to_answerer: bytes = field(repr=False)
    answerer_to_dialer: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class LinkKeys:
    """Everything that a finished handshake yields. The same at both ends; its keys show in no ``repr``."""

    link_id: bytes
    cipher: str
    streams: tuple[StreamKeys, ...]
    opening_key: bytes = field(repr=False)
    welcome_key: bytes = field(repr=False)

    def opening(self, stream: int, count: int = 1) -> bytes:
        """Return the 64 bytes with which the dialer opens data stream ``stream`` of ``count`` that it will open."""
        named = MAGIC + self.link_id + _WHICH_STREAM.pack(count - 1, stream)
        return named + hmac.digest(self.opening_key, named, "sha256")

    def welcome(self, stream: int, count: int = 1) -> bytes:
        """Return the 32 bytes with which the answerer replies to :meth:`opening`."""
        return hmac.digest(self.welcome_key, self.opening(stream, count), "sha256")

    def check_welcome(self, stream: int, data: bytes | bytearray, count: int = 1) -> None:
        """Raise AuthenticationError unless ``data`` is :meth:`welcome`."""
        if not hmac.compare_digest(self.welcome(stream, count), data):
            raise AuthenticationError("whoever answered at that address does not hold the keys of the link")


def derive_keys(offer: LinkOffer, answer: LinkAnswer, *, dialer: str, answerer: str) -> LinkKeys:
    """Return the keys of the link that ``offer`` and ``answer`` agree on.

    The input keying material is both secrets, the salt a constant, the info the transcript. The derivation is fixed
    by test vectors.
    """
    transcript = _transcript(
        b"sparkle link",
        LINK_VERSION.to_bytes(4, "big"),
        answer.cipher.encode(),
        answer.streams.to_bytes(4, "big"),
        offer.mesh_id,
        offer.link_id,
        dialer.encode(),
        answerer.encode(),
    )
    key_count = 2 + 2 * answer.streams
    material = HKDF(SHA256(), key_count * KEY_BYTES, salt=b"sparkle link 1", info=transcript).derive(
        offer.secret + answer.secret
    )
    keys = [material[start : start + KEY_BYTES] for start in range(0, len(material), KEY_BYTES)]
    return LinkKeys(
        link_id=offer.link_id,
        cipher=answer.cipher,
        streams=tuple(StreamKeys(*keys[at : at + 2]) for at in range(2, key_count, 2)),
        opening_key=keys[0],
        welcome_key=keys[1],
    )


def _transcript(*parts: bytes) -> bytes:
    """Return a digest of ``parts`` that no other list of parts has: lengths are in it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class LinkParty:
    """What one side brings to every handshake."""

    peer_id: str
    mesh_id: bytes
    host_id: bytes
    ciphers: tuple[str, ...]
    kinds: tuple[str, ...] = ("tcp",)
    local_address: str = ""
    streams: int = 1

    def offer(self, addresses: Sequence[str], entropy: Entropy, *, without: Collection[str] = ()) -> LinkOffer:
        """Return a new offer, of all kinds of links but those in ``without``."""
        return LinkOffer(
            version=LINK_VERSION,
            mesh_id=self.mesh_id,
            link_id=entropy.token(_LINK_ID_BYTES),
            secret=entropy.token(KEY_BYTES),
            ciphers=self.ciphers,
            streams=self.streams,
            host_id=self.host_id,
            addresses=tuple(addresses)[: limits.ADDRESSES_PER_PEER_MAX_COUNT],
            kinds=tuple(kind for kind in self.kinds if kind not in without),
        )

    def upgrade(self, moves: bytes, addresses: Sequence[str], entropy: Entropy) -> LinkUpgrade:
        """Return a new offer of a direct connection for the link that was offered with the link id ``moves``."""
        offer = self.offer(addresses, entropy, without=(SHARED_MEMORY, LIBP2P_STREAM))
        return LinkUpgrade(**msgspec.structs.asdict(offer), moves=moves)

    def answer(
        self, offer: LinkOffer, dialer: str, addresses: Sequence[str], entropy: Entropy
    ) -> tuple[LinkAnswer, LinkKeys]:
        """Return the reply to ``offer`` of peer ``dialer``, and the keys.

        Raises
        ------
        LinkRefusedError
            If there can be no link; the message is for both sides.
        """
        if not hmac.compare_digest(offer.mesh_id, self.mesh_id):
            raise LinkRefusedError("the two sides mean different meshes")
        cipher = choose_cipher(self.ciphers, offer.ciphers)
        if cipher is None:
            raise LinkRefusedError(
                f"no cipher in common: peer {dialer} has {', '.join(offer.ciphers)}, peer {self.peer_id} "
                f"{', '.join(self.ciphers)}"
            )
        same_host = offer.host_id == self.host_id
        kinds = tuple(kind for kind in offer.kinds if kind in self.kinds and (same_host or kind != SHARED_MEMORY))
        if not kinds:
            raise LinkRefusedError(
                f"no kind of link in common: peer {dialer} has {', '.join(offer.kinds) or 'none'}, peer {self.peer_id} "
                f"{', '.join(self.kinds)}{'' if same_host else ', and they are not on one host'}"
            )
        answer = LinkAnswer(
            version=LINK_VERSION,
            secret=entropy.token(KEY_BYTES),
            cipher=cipher,
            streams=min(self.streams, offer.streams),
            host_id=self.host_id,
            addresses=tuple(addresses)[: limits.ADDRESSES_PER_PEER_MAX_COUNT],
            kinds=kinds,
            local_address=self.local_address if SHARED_MEMORY in kinds else "",
        )
        return answer, derive_keys(offer, answer, dialer=dialer, answerer=self.peer_id)

    def accept(self, offer: LinkOffer, answer: LinkAnswer, answerer: str) -> LinkKeys:
        """Return the keys once ``answer`` of peer ``answerer`` has come to our ``offer``.

        Raises
        ------
        ProtocolError
            If it chose what was not offered (cipher, streams, kinds).
        """
        if answer.cipher not in offer.ciphers:
            raise ProtocolError(f"the peer chose the cipher {answer.cipher!r}, which was not offered")
        if not answer.kinds or not set(answer.kinds) <= set(offer.kinds):
            raise ProtocolError(f"the peer chose links of kind {answer.kinds!r} where {offer.kinds!r} were offered")
        if answer.streams > offer.streams:
            raise ProtocolError(f"the peer chose {answer.streams} streams where {offer.streams} were offered")
        return derive_keys(offer, answer, dialer=self.peer_id, answerer=answerer)


@dataclass(slots=True)
class _Pending:
    keys: LinkKeys
    peer_id: str
    expires_at: float
    opened: set[int] = field(default_factory=set)
    #: How many streams the dialer opens; None before it has opened the first of them.
    count: int | None = None


class PendingLinks:
    """The answerer's table of links that were agreed on and whose data streams have not opened yet.

    Bounded by ``limits.LINK_PENDING_MAX_COUNT``, per peer by ``limits.LINK_PENDING_PER_PEER_MAX_COUNT``; entries
    expire. A stream opens once.
    """

    def __init__(self) -> None:
        self._pending: dict[bytes, _Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, keys: LinkKeys, peer_id: str, now: float) -> None:
        """Expect the streams of ``keys`` within ``limits.LINK_HANDSHAKE_TIMEOUT_S``.

        Raises
        ------
        LinkRefusedError
            If there are too many, of this peer or of all, or if the link id was used a moment ago.
        """
        self.expire(now)
        if keys.link_id in self._pending:
            raise LinkRefusedError("the link id is in use")
        of_peer = sum(pending.peer_id == peer_id for pending in self._pending.values())
        if len(self._pending) >= limits.LINK_PENDING_MAX_COUNT or of_peer >= limits.LINK_PENDING_PER_PEER_MAX_COUNT:
            raise LinkRefusedError(f"too many links are being opened: {len(self._pending)}, of this peer {of_peer}")
        self._pending[keys.link_id] = _Pending(keys, peer_id, now + limits.LINK_HANDSHAKE_TIMEOUT_S)

    def discard(self, link_id: bytes) -> None:
        """Expect the streams of that link no longer."""
        self._pending.pop(link_id, None)

    def expire(self, now: float) -> None:
        """Forget the links whose time is up."""
        for link_id in [link_id for link_id, pending in self._pending.items() if pending.expires_at <= now]:
            del self._pending[link_id]

    def open(self, opening: bytes | bytearray, now: float) -> tuple[LinkKeys, int, int]:
        """Return the keys, the number of the stream that ``opening`` opens, and how many its link will have.

        It cannot be opened again.

        Raises
        ------
        ProtocolError
            If it is no opening, or of another number of streams than those before it.
        AuthenticationError
            If no such link or stream is expected (any longer), or the proof is wrong.
        """
        if len(opening) != OPENING_BYTES or not opening.startswith(MAGIC):
            raise ProtocolError(f"{len(opening)} bytes are not the opening of a data stream")
        self.expire(now)
        link_id = bytes(opening[len(MAGIC) : len(MAGIC) + _LINK_ID_BYTES])
        others, stream = _WHICH_STREAM.unpack_from(opening, len(MAGIC) + _LINK_ID_BYTES)
        count = others + 1
        pending = self._pending.get(link_id)
        if pending is None or stream in pending.opened or not stream < count <= len(pending.keys.streams):
            raise AuthenticationError("a data stream was opened that nobody expects: unknown, expired or open already")
        # A wrong proof must not use up the place of the right one.
        if not hmac.compare_digest(pending.keys.opening(stream, count), bytes(opening)):
            raise AuthenticationError("a data stream was opened with a wrong proof")
        if pending.count not in (None, count):
            raise ProtocolError(f"a data stream of {count} was opened where the one before was of {pending.count}")
        pending.count = count
        pending.opened.add(stream)
        if len(pending.opened) == count:
            del self._pending[link_id]
        return pending.keys, stream, count
