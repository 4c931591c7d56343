"""Questions and answers over the fabric: streams that stay open for the next question, bounded on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import trio

from sparkle_mesh import limits, wire
from sparkle_mesh.capabilities.messages import PROTOCOL, Answer, Question, Sealed, seal_context
from sparkle_mesh.capabilities.records import Secrets
from sparkle_mesh.clock import Entropy
from sparkle_mesh.errors import LinkClosedError, ProtocolError, SparkleError, UnreachableError
from sparkle_mesh.fabric.framing import receive_message, send_message
from sparkle_mesh.fabric.interface import Fabric, FabricStream, PeerId
from sparkle_mesh.wire import PeerAddress


class SealedStream:
    """Messages on one stream, sealed for its two ends."""

    def __init__(self, stream: FabricStream, me: PeerId, secrets: Secrets, entropy: Entropy) -> None:
        self.stream = stream
        self._secrets, self._entropy = secrets, entropy
        self._to_peer, self._from_peer = seal_context(me, stream.peer_id), seal_context(stream.peer_id, me)

    async def send(self, message: wire.Message) -> None:
        sealed = self._secrets.seal(wire.encode(message), self._entropy, context=self._to_peer)
        await send_message(self.stream, Sealed(sealed=sealed), max_bytes=limits.KAD_FRAME_MAX_BYTES)

    async def receive(self, message_type: object) -> Any:
        """Return the next message; raises AuthenticationError if its sender does not hold the mesh's key."""
        frame = await receive_message(self.stream, Sealed, max_bytes=limits.KAD_FRAME_MAX_BYTES)
        payload = self._secrets.unseal(frame.sealed, context=self._from_peer)
        return wire.decode(payload, message_type, max_bytes=limits.KAD_MESSAGE_MAX_BYTES)


class _Way:
    """The way to one peer: its stream, if one is open, and whose turn it is."""

    def __init__(self) -> None:
        self.turn = trio.Lock()
        self.stream: SealedStream | None = None
        self.used_at = 0.0


class Asker:
    """Asks peers, each over one stream that is kept for ``limits.KAD_STREAM_IDLE_S``."""

    def __init__(self, fabric: Fabric, secrets: Secrets, entropy: Entropy) -> None:
        self._fabric, self._secrets, self._entropy = fabric, secrets, entropy
        self._ways: dict[PeerId, _Way] = {}

    async def ask(
        self, peer: PeerAddress, question: Question, *, timeout_s: float = limits.KAD_QUESTION_TIMEOUT_S
    ) -> Answer:
        """Return what ``peer`` answers; it is connected to if it is not.

        Raises
        ------
        UnreachableError
            If no answer came in time.
        ProtocolError
            If what came is none, or is not sealed under the mesh's key.
        """
        way = self._ways.setdefault(peer.peer_id, _Way())
        with trio.move_on_after(timeout_s):
            async with way.turn:
                return await self._ask(way, peer, question)
        raise UnreachableError(f"peer {peer.peer_id} did not answer a {type(question).__name__} in {timeout_s:g} s")

    async def _ask(self, way: _Way, peer: PeerAddress, question: Question) -> Answer:
        if way.stream is not None:
            try:
                return await self._exchange(way, way.stream, question)
            except LinkClosedError:
                # The peer closes what is idle: once more, on a new one.
                way.stream = None
        return await self._exchange(way, await self._open(peer), question)

    async def _open(self, peer: PeerAddress) -> SealedStream:
        if peer.peer_id not in self._fabric.connected_peers():
            await self._fabric.connect(peer.peer_id, peer.addresses, timeout_s=limits.KAD_QUESTION_TIMEOUT_S)
        stream = await self._fabric.open_stream(peer.peer_id, PROTOCOL, timeout_s=limits.KAD_QUESTION_TIMEOUT_S)
        return SealedStream(stream, self._fabric.peer_id, self._secrets, self._entropy)

    async def _exchange(self, way: _Way, stream: SealedStream, question: Question) -> Answer:
        way.stream = None
        try:
            await stream.send(question)
            answer: Answer = await stream.receive(Answer)
            way.stream, way.used_at = stream, trio.current_time()
            return answer
        finally:
            if way.stream is None:
                stream.stream.abort()

    async def close_idle(self, now: float, *, idle_s: float = limits.KAD_STREAM_IDLE_S / 2) -> None:
        """Close the streams that nobody has used of late: sooner than the peer would."""
        for peer_id, way in list(self._ways.items()):
            if not way.turn.locked() and now - way.used_at >= idle_s:
                del self._ways[peer_id]
                if way.stream is not None:
                    await way.stream.stream.aclose()


class _Allowance:
    """So many questions a second, and some at once (a token bucket)."""

    def __init__(self, now: float) -> None:
        self._left, self._at = float(limits.KAD_QUESTIONS_BURST_MAX_COUNT), now

    def is_full(self, now: float) -> bool:
        """Whether a new one would allow as much."""
        return self._left + (now - self._at) * limits.KAD_QUESTIONS_PER_S_MAX >= limits.KAD_QUESTIONS_BURST_MAX_COUNT

    def wait_s(self, now: float) -> float:
        """Take one question out; return how long it has to wait."""
        gained = (now - self._at) * limits.KAD_QUESTIONS_PER_S_MAX
        self._left = min(self._left + gained, limits.KAD_QUESTIONS_BURST_MAX_COUNT) - 1
        self._at = now
        return max(-self._left / limits.KAD_QUESTIONS_PER_S_MAX, 0.0)


class Answerer:
    """Serves the protocol: ``answer(question, sender)`` for each question of one that is ``welcome``.

    ``offended(sender)`` is for what is no question.
    """

    def __init__(
        self,
        fabric: Fabric,
        secrets: Secrets,
        entropy: Entropy,
        answer: Callable[[Question, PeerId], Answer],
        offended: Callable[[PeerId], object],
        welcome: Callable[[PeerId], bool],
    ) -> None:
        self._fabric, self._secrets, self._entropy = fabric, secrets, entropy
        self._answer, self._offended, self._welcome = answer, offended, welcome
        self._streams: Counter[PeerId] = Counter()
        self._allowances: dict[PeerId, _Allowance] = {}
        #: Streams that ended with something that is no question, since the start.
        self.malformed_count = 0

    def start(self) -> None:
        """Serve from now on."""
        self._fabric.handle(PROTOCOL, self._serve)

    async def _serve(self, stream: FabricStream) -> None:
        peer_id = stream.peer_id
        if self._streams[peer_id] >= limits.KAD_STREAMS_PER_PEER_MAX_COUNT:
            raise ProtocolError(f"{peer_id} has {self._streams[peer_id]} streams of {PROTOCOL} open; no more may be")
        self._streams[peer_id] += 1
        now = trio.current_time()
        allowance = self._allowances.setdefault(peer_id, _Allowance(now))
        try:
            sealed = SealedStream(stream, self._fabric.peer_id, self._secrets, self._entropy)
            await self._answer_all(sealed, allowance)
        except LinkClosedError:
            await stream.aclose()
        except SparkleError:
            self.malformed_count += 1
            self._offended(peer_id)
            raise
        finally:
            self._streams[peer_id] -= 1
            if not self._streams[peer_id]:
                del self._streams[peer_id]

    def forget_idle(self, now: float) -> None:
        """Forget of peers without streams what a new start would not give them."""
        for peer_id, allowance in list(self._allowances.items()):
            if peer_id not in self._streams and allowance.is_full(now):
                del self._allowances[peer_id]

    async def _answer_all(self, sealed: SealedStream, allowance: _Allowance) -> None:
        peer_id = sealed.stream.peer_id
        while True:
            question: Question | None = None
            with trio.move_on_after(limits.KAD_STREAM_IDLE_S):
                question = await sealed.receive(Question)
            if question is None or not self._welcome(peer_id):
                await sealed.stream.aclose()
                return
            await trio.sleep(allowance.wait_s(trio.current_time()))
            with trio.move_on_after(limits.KAD_STREAM_IDLE_S) as writing:
                await sealed.send(self._answer(question, peer_id))
            if writing.cancelled_caught:
                raise ProtocolError(f"{peer_id} does not read the answers to its questions")
