"""The beginning of a mesh's stream: both sides prove the key, and introduce themselves."""

from __future__ import annotations

from collections.abc import Sequence

from sparkle_mesh.errors import ProtocolError, WrongKeyError
from sparkle_mesh.fabric.framing import receive_message, send_message
from sparkle_mesh.fabric.interface import FabricStream
from sparkle_mesh.membership.messages import Greeting, Introduction, Refused
from sparkle_mesh.membership.proof import AnswererProof, Fail, Instruction, OpenerProof, Proven, Say


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


async def receive_introduction(stream: FabricStream) -> Introduction:
    """Return how the peer introduces itself.

    Raises
    ------
    WrongKeyError, ProtocolError
        If it refuses instead, or what it says is none.
    """
    answer = await receive_message(stream, Introduction | Refused)
    if isinstance(answer, Refused):
        error_type = WrongKeyError if answer.code == "key" else ProtocolError
        raise error_type(f"peer {stream.peer_id} refused: {answer.reason}")
    assert isinstance(answer, Introduction)
    return answer
