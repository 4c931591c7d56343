"""The beginning of a mesh's stream: both sides prove the key, and introduce themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from sparkle_mesh import limits
from sparkle_mesh.errors import ProtocolError, UnreachableError, WrongKeyError
from sparkle_mesh.fabric.framing import receive_message, send_message
from sparkle_mesh.fabric.interface import Fabric, FabricStream, PeerId
from sparkle_mesh.membership.messages import PROTOCOL, Greeting, Introduction, Refused
from sparkle_mesh.membership.proof import AnswererProof, Fail, Instruction, OpenerProof, Proven, Say


async def open_mesh_stream(fabric: Fabric, peer_id: PeerId) -> FabricStream | None:
    """Open the mesh's stream to ``peer_id``; None if it is connected no more.

    A peer that is only just starting may not serve it yet, so it is tried more than once.

    Raises
    ------
    UnreachableError
        If it does not speak the protocol, or does not answer.
    """
    for attempt in range(limits.MESH_STREAM_ATTEMPTS_COUNT):
        try:
            return await fabric.open_stream(peer_id, PROTOCOL, timeout_s=limits.OPEN_STREAM_TIMEOUT_S)
        except UnreachableError as error:
            refusal = error
        await trio.sleep(limits.MESH_STREAM_RETRY_S * 2**attempt)
        if peer_id not in fabric.connected_peers():
            return None
    raise refusal


async def prove(stream: FabricStream, proof: OpenerProof | AnswererProof, first: Sequence[Instruction]) -> None:
    """Carry out what the ``proof`` says, beginning with ``first``, until the peer has proven the key.

    Raises
    ------
    SparkleError
        If it does not.
    """
    instructions = first
    while True:
        proven = False
        for instruction in instructions:
            match instruction:
                case Say(message):
                    await send_message(stream, message)
                case Fail(error):
                    raise error
                case Proven():
                    proven = True
        if proven:
            return
        instructions = proof.receive(await receive_message(stream, Greeting))


async def introduce(
    stream: FabricStream,
    introduction: Introduction,
    *,
    is_opener: bool,
    judge: Callable[[PeerId, Introduction], PeerId | Refused | None],
) -> tuple[Introduction, PeerId | None]:
    """Exchange introductions; return the peer's, and which machine ``judge`` finds it to be of.

    Raises
    ------
    WrongKeyError, ProtocolError
        If it refuses, is refused by ``judge``, or says something else.
    """
    if is_opener:
        await send_message(stream, introduction)
    answer = await _receive_introduction(stream)
    verdict = judge(stream.peer_id, answer)
    if isinstance(verdict, Refused):
        await send_message(stream, verdict)
        raise ProtocolError(verdict.reason)
    if not is_opener:
        # Not before: so the opener learns that it is refused instead of being admitted for a moment.
        await send_message(stream, introduction)
    return answer, verdict


async def _receive_introduction(stream: FabricStream) -> Introduction:
    answer = await receive_message(stream, Introduction | Refused)
    if isinstance(answer, Refused):
        error_type = WrongKeyError if answer.code == "key" else ProtocolError
        raise error_type(f"peer {stream.peer_id} refused: {answer.reason}")
    assert isinstance(answer, Introduction)
    return answer
