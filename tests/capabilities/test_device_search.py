"""What is asked for, and which devices fit it."""

from __future__ import annotations

import math

import pytest

from sparkle_mesh import limits
from sparkle_mesh.capabilities.labels import MEMORY_RANGES_COUNT, device_label, index_labels
from sparkle_mesh.capabilities.records import CapabilityRecord
from sparkle_mesh.capabilities.search import DEVICE_KINDS, DeviceQuery, FoundRecord, choose_devices, parse_memory
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.errors import UsageError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("16GB", 16 * 10**9),
        ("16 GiB", 16 * GIB),
        (" 1.5tib ", 1536 * GIB),
        ("800M", 800 * 10**6),
        ("512", 512),
        ("512b", 512),
        (0, 0),
        (2.5e9, 2_500_000_000),
    ],
)
def test_amounts_of_memory(text, nbytes):
    assert parse_memory(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "much", "-1GB", "16 GBit", "1e9", None, True, -1, math.nan, math.inf, 2**63, "9EB"]
)
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(UsageError, match="no amount of memory"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "gpu"}, "kind 'gpu' is not one of cpu, cuda, rocm, opencl"),
        ({"limit": 0}, "limit 0 must be 1 to"),
        ({"limit": limits.FOUND_DEVICES_MAX_COUNT + 1}, "must be 1 to"),
        ({"min_gflops": -1.0}, "must not be negative"),
        ({"min_gflops": math.nan}, "must not be negative"),
        ({"dtype": ""}, "no name of one"),
        ({"min_memory": "lots"}, "no amount of memory"),
    ],
)
def test_wrong_questions(arguments, says):
    with pytest.raises(UsageError, match=says):
        DeviceQuery.of(**arguments)


def test_a_question_asks_where_such_devices_are_and_nowhere_else():
    device = DeviceInfo(kind="cuda", index=0, name="a GPU", memory_bytes=24 * GIB)
    labels = set(DeviceQuery.of("cuda", min_memory="16GB").labels())
    assert labels & index_labels("node", [device]) == {device_label("cuda", 3)}
    assert len(labels) < MEMORY_RANGES_COUNT
    assert not set(DeviceQuery.of("cuda", min_memory="64GiB").labels()) & index_labels("node", [device])
    assert len(DeviceQuery.of().labels()) == len(DEVICE_KINDS) * MEMORY_RANGES_COUNT


def gpu(gib: float = 24, index: int = 0, gflops: float | None = None) -> DeviceInfo:
    measured = {} if gflops is None else {"float32": gflops}
    return DeviceInfo(kind="cuda", index=index, name="a GPU", memory_bytes=int(gib * GIB), gflops=measured)


def found(publisher: str, *devices: DeviceInfo, host: str = "", role: str = "node", age_s: float = 1.0) -> FoundRecord:
    record = CapabilityRecord(
        host_id=(host or publisher).encode().ljust(16), role=role, software="s", addresses=(), devices=devices
    )
    return FoundRecord(publisher, 1, record, age_s)


def chosen(records: list[FoundRecord], **query) -> list[tuple[str, int]]:
    return [(one.peer_id, one.device.index) for one in choose_devices(records, DeviceQuery.of(**query))]


def test_the_fastest_come_first_then_the_largest_then_the_freshest():
    records = [
        found("slow", gpu(gflops=10.0)),
        found("two", gpu(8, 0, 90.0), gpu(8, 1, 20.0)),
        found("small", gpu(8)),
        found("large", gpu(80), age_s=30.0),
        found("fresh", gpu(80), age_s=2.0),
    ]
    order = [("two", 0), ("two", 1), ("slow", 0), ("fresh", 0), ("large", 0), ("small", 0)]
    assert chosen(records) == order
    assert chosen(records, limit=2) == order[:2]
    assert chosen(records, min_gflops=15) == order[:2]
    assert chosen(records, min_gflops=15, dtype="float16") == []
    assert chosen(records, min_memory="24GiB") == [("slow", 0), ("fresh", 0), ("large", 0)]
    assert chosen(records, kind="cpu") == []


def test_trainers_of_a_machine_do_not_tell_of_its_devices_once_more():
    records = [
        found("trainer 1", gpu(), host="a", role="trainer", age_s=0.0),
        found("node 1", gpu(), host="a", age_s=9.0),
        found("node 2", gpu(), host="a", age_s=9.0),
        found("trainer 2", gpu(), host="b", role="trainer", age_s=5.0),
        found("trainer 3", gpu(), host="b", role="trainer", age_s=3.0),
    ]
    assert sorted(chosen(records)) == [("node 1", 0), ("node 2", 0), ("trainer 3", 0)]
