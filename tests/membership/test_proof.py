"""The mutual proof of a mesh's key: both machines against each other and against impostors."""

from __future__ import annotations

import pytest

from sparkle_mesh.errors import ProtocolError, SparkleError, VersionError, WrongKeyError
from sparkle_mesh.membership.keys import MeshKey, MeshSecrets
from sparkle_mesh.membership.messages import Challenge, Hello, Proof, Refused
from sparkle_mesh.membership.proof import AnswererProof, Fail, Instruction, OpenerProof, Proven, Say

OURS = MeshSecrets("run", MeshKey(b"a" * 32))
OTHERS = MeshSecrets("run", MeshKey(b"b" * 32))


def pair(opener: MeshSecrets = OURS, answerer: MeshSecrets = OURS) -> tuple[OpenerProof, AnswererProof]:
    return (
        OpenerProof(opener, me="A", peer="B", nonce=b"1" * 32),
        AnswererProof(answerer, me="B", peer="A", nonce=b"2" * 32),
    )


def said(instructions: list[Instruction]) -> Hello | Challenge | Proof | Refused:
    assert isinstance(instructions[0], Say)
    return instructions[0].message


def failure(instructions: list[Instruction]) -> SparkleError:
    assert isinstance(instructions[-1], Fail)
    assert Proven() not in instructions
    return instructions[-1].error


def test_two_holders_of_the_key_prove_it_to_each_other() -> None:
    opener, answerer = pair()
    challenge = answerer.receive(said(opener.start()))
    answer = opener.receive(said(challenge))
    assert answer[1:] == [Proven()]
    assert answerer.receive(said(answer)) == [Proven()]


def test_a_wrong_key_is_told_to_both_sides() -> None:
    opener, answerer = pair(answerer=OTHERS)
    answer = opener.receive(said(answerer.receive(said(opener.start()))))
    assert isinstance(failure(answer), WrongKeyError)
    told = said(answer)
    assert isinstance(told, Refused)
    assert told.code == "key"
    assert isinstance(failure(answerer.receive(told)), WrongKeyError)


def test_an_opener_without_the_key_is_refused() -> None:
    opener, answerer = pair()
    answerer.receive(said(opener.start()))
    answer = answerer.receive(Proof(proof=b"?" * 32))
    assert isinstance(failure(answer), WrongKeyError)
    told = said(answer)
    assert isinstance(told, Refused)
    assert isinstance(failure(opener.receive(told)), WrongKeyError)


def test_a_proof_is_good_for_one_pair_one_direction_and_one_exchange() -> None:
    opener, answerer = pair()
    challenge = said(answerer.receive(said(opener.start())))
    assert isinstance(challenge, Challenge)
    # Reflected: the answerer's own proof does not serve as the opener's.
    assert isinstance(failure(answerer.receive(Proof(proof=challenge.proof))), WrongKeyError)
    # Replayed to another opener nonce, or relayed under another identity.
    for other in (
        OpenerProof(OURS, me="A", peer="B", nonce=b"3" * 32),
        OpenerProof(OURS, me="A", peer="C", nonce=b"1" * 32),
        OpenerProof(OURS, me="C", peer="B", nonce=b"1" * 32),
    ):
        assert isinstance(failure(other.receive(challenge)), WrongKeyError)


def test_versions_that_do_not_overlap_are_told_to_both() -> None:
    _, answerer = pair()
    answer = answerer.receive(Hello(version_min=2, version_max=3, nonce=b"1" * 32))
    assert isinstance(failure(answer), VersionError)
    opener, _ = pair()
    assert isinstance(failure(opener.receive(said(answer))), VersionError)
    assert isinstance(failure(opener.receive(Challenge(version=9, nonce=b"2" * 32, proof=b"?" * 32))), VersionError)


@pytest.mark.parametrize("wrong", [Proof(proof=b"?" * 32), Challenge(version=1, nonce=b"2" * 32, proof=b"?" * 32)])
def test_messages_out_of_turn_are_protocol_errors(wrong: Proof | Challenge) -> None:
    opener, answerer = pair()
    assert isinstance(failure(answerer.receive(wrong)), ProtocolError)
    if isinstance(wrong, Proof):
        assert isinstance(failure(opener.receive(wrong)), ProtocolError)
    hello = said(opener.start())
    _, answerer = pair()
    answerer.receive(hello)
    error = failure(answerer.receive(hello))
    assert isinstance(error, ProtocolError)
    assert not isinstance(error, WrongKeyError)


def test_other_refusals_are_protocol_errors_with_the_reason() -> None:
    opener, _ = pair()
    error = failure(opener.receive(Refused(code="full", reason="2048 peers")))
    assert isinstance(error, ProtocolError)
    assert "2048 peers" in str(error)
