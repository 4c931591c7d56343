"""Ten thousand junk records of one that is of the mesh, as fast as it can send them."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from itertools import cycle

import msgspec
import pytest
import trio

from sparkle_mesh import limits, wire
from sparkle_mesh.capabilities.labels import device_label, index_labels, memory_range
from sparkle_mesh.capabilities.messages import PROTOCOL, Sealed, Store, seal_context
from sparkle_mesh.capabilities.records import CapabilityRecord, SignedRecord, sign_record
from sparkle_mesh.capabilities.search import DeviceQuery
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.fabric.framing import encode_frame
from sparkle_mesh.fabric.identity import Identity
from sparkle_mesh.node import MeshNode, open_node

# Of everything that the honest pair does, under attack, on a machine that is busy.
DEADLINE_S = 4.0
JUNK_COUNT = 10_000
GPU = DeviceInfo(kind="cuda", index=0, name="a made-up GPU", memory_bytes=80 << 30)


def junk(attacker: MeshNode, victim: MeshNode) -> dict[str, Store]:
    """Return questions to store what must not be stored, by what is wrong with it."""
    identity, secrets, stolen = attacker.config.identity, attacker.secrets, Identity.generate()
    record = CapabilityRecord(host_id=b"h" * 16, role="node", software="s", addresses=(), devices=(GPU,))
    keys = tuple(map(secrets.locate, index_labels(record.role, record.devices)))
    good = sign_record(record, identity, secrets, sequence=2**60)

    def changed(**fields: object) -> SignedRecord:
        return msgspec.structs.replace(good, **fields)

    replayed = sign_record(record, stolen, secrets, sequence=1)
    return {
        "forged": Store(record=changed(publisher=victim.peer_id), keys=keys),
        "replayed": Store(record=replayed, keys=tuple(map(secrets.locate, index_labels(record.role, record.devices)))),
        "altered": Store(record=changed(sequence=2**61), keys=keys),
        "kept for longer": Store(record=changed(lifetime_s=limits.CAPABILITY_LIFETIME_MAX_S), keys=keys),
        "misfiled": Store(record=good, keys=(secrets.locate("device 3 cpu"),)),
        "under no key": Store(record=good, keys=()),
        "no record inside": Store(record=changed(sealed=b"x" * limits.CAPABILITY_RECORD_MAX_BYTES), keys=keys),
    }


def oversized(attacker: MeshNode, victim: MeshNode) -> dict[str, Store]:
    """Return those that do not even decode."""
    store = junk(attacker, victim)["misfiled"]
    record = store.record
    return {
        "record": Store(
            record=msgspec.structs.replace(record, sealed=bytes(limits.CAPABILITY_RECORD_MAX_BYTES + 1)), keys=()
        ),
        "keys": Store(record=record, keys=(b"k" * 32,) * (limits.CAPABILITY_KEYS_MAX_COUNT + 1)),
        "lifetime": Store(
            record=msgspec.structs.replace(record, lifetime_s=limits.CAPABILITY_LIFETIME_MAX_S + 1.0), keys=()
        ),
        "expired": Store(record=msgspec.structs.replace(record, lifetime_s=0.0), keys=()),
    }


def frame(attacker: MeshNode, victim: MeshNode, question: Store) -> bytes:
    context = seal_context(attacker.peer_id, victim.peer_id)
    sealed = attacker.secrets.seal(wire.encode(question), context=context)
    return encode_frame(Sealed(sealed=sealed), max_bytes=limits.KAD_FRAME_MAX_BYTES)


async def test_ten_thousand_of_one_peer(honest_pair, node_config, until):
    one = honest_pair.one
    service = one.capabilities
    async with open_node(node_config(one)) as insider:
        await until(lambda: insider.peer_id in one.membership.channels)
        frames = cycle([frame(insider, one, question) for question in junk(insider, honest_pair.other).values()])
        sent: Counter[int] = Counter()

        async def flood(number: int) -> None:
            """Send without a look at the answers, which are taken all the same."""
            stream = await insider.fabric.open_stream(one.peer_id, PROTOCOL)

            async def take() -> None:
                with suppress(SparkleError):
                    while await stream.read(limits.STREAM_READ_MAX_BYTES):
                        pass

            async with trio.open_nursery() as nursery:
                nursery.start_soon(take)
                with suppress(SparkleError):
                    for _ in range(JUNK_COUNT // limits.KAD_STREAMS_PER_PEER_MAX_COUNT):
                        await stream.write(next(frames))
                        sent[number] += 1

        refused, started = service._answers.refused_count, trio.current_time()
        async with honest_pair.working(DEADLINE_S), trio.open_nursery() as nursery:
            for number in range(limits.KAD_STREAMS_PER_PEER_MAX_COUNT):
                nursery.start_soon(flood, number)
            # What it may ask at once has been refused, and more waits.
            await until(lambda: service._answers.refused_count - refused >= limits.KAD_QUESTIONS_BURST_MAX_COUNT - 10)
            rounds = honest_pair.rounds
            await until(lambda: honest_pair.rounds >= rounds + 3)
            nursery.cancel_scope.cancel()
        took_s = trio.current_time() - started
        answered = service._answers.refused_count - refused
        assert answered <= limits.KAD_QUESTIONS_BURST_MAX_COUNT + took_s * limits.KAD_QUESTIONS_PER_S_MAX + 10
        assert sent.total() > answered
        # Nothing of it is held: the pair's own, and what the insider's node itself has told of its devices.
        found = await honest_pair.other.find_devices(DeviceQuery.of("cuda"))
        assert "a made-up GPU" not in {each.device.name for each in found}
        assert len(service.store) <= 3
        key = one.secrets.locate(device_label("cuda", memory_range(GPU.memory_bytes)))
        assert list(service.store.get(key, trio.current_time())) == []


@pytest.mark.parametrize("what", ["record", "keys", "lifetime", "expired"])
async def test_what_is_over_a_bound_ends_its_stream_and_counts_as_an_offence(honest_pair, node_config, until, what):
    one = honest_pair.one
    async with honest_pair.working(DEADLINE_S), open_node(node_config(one)) as insider:
        await until(lambda: insider.peer_id in one.membership.channels)
        held = len(one.capabilities.store)
        for _ in range(limits.OFFENCES_MAX_COUNT):
            with suppress(SparkleError):
                stream = await insider.fabric.open_stream(one.peer_id, PROTOCOL)
                await stream.write(frame(insider, one, oversized(insider, honest_pair.other)[what]))
                # It is not answered.
                assert not await stream.read(1)
        await until(lambda: insider.peer_id not in one.membership.channels)
        assert not one.membership.is_welcome(insider.peer_id)
        assert len(one.capabilities.store) <= held + 1
