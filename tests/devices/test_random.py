"""Random numbers: those of the paper, alike on every device, and spread as they should be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.devices.cpu import CpuDevice
from sparkle_mesh.devices.device import DeviceCapabilities
from sparkle_mesh.devices.null import NullDevice
from sparkle_mesh.devices.random import RANDOM_DTYPES, fill_random, philox
from sparkle_mesh.errors import UsageError

# "philox4x32 10" in the vectors that the paper's authors publish with Random123.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def filled(device, dtype, count, seed):
    memory = device.allocate(count * np.dtype(dtype).itemsize)
    fill_random(memory, dtype, count, seed)
    array = np.empty(count, dtype)
    device.copy_to_host(memory, array)
    device.free(memory)
    return array


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_papers_vectors(counter, key, expected):
    words = philox(tuple(np.array([word], dtype=np.uint64) for word in counter), key[0] | key[1] << 32)
    assert " ".join(f"{int(word[0]):08x}" for word in words) == expected


def test_the_stream_begins_with_the_papers_first_vector(real_device):
    assert [f"{word:08x}" for word in filled(real_device, "uint32", 4, 0)] == KNOWN[0][2].split()


SEEDS = st.integers(0, 2**64 - 1)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dtype=st.sampled_from(sorted(RANDOM_DTYPES)), count=st.integers(0, 3000), seed=SEEDS, data=st.data())
def test_every_device_makes_the_same(real_device, dtype, count, seed, data):
    expected = filled(CpuDevice(), dtype, count, seed)
    assert filled(real_device, dtype, count, seed).tobytes() == expected.tobytes()
    # A shorter one is the beginning of a longer one.
    fewer = data.draw(st.integers(0, count))
    assert filled(real_device, dtype, fewer, seed).tobytes() == expected[:fewer].tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_are_whole_steps_in_the_unit_interval(cpu, dtype):
    count, digits = 200_000, np.finfo(dtype).nmant + 1
    numbers = filled(cpu, dtype, count, 11).astype("f8")
    assert numbers.min() >= 0
    assert numbers.max() < 1
    steps = numbers * 2.0**digits
    assert (steps == np.floor(steps)).all()
    assert abs(numbers.mean() - 0.5) < 4 * np.sqrt(1 / 12 / count)
    assert abs(numbers.var() - 1 / 12) < 0.001
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / np.sqrt(count)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool"])
def test_integers_take_all_values_alike(cpu, dtype):
    numbers = filled(cpu, dtype, 256 * 1000, 5)
    values, counts = np.unique(numbers, return_counts=True)
    assert values.size == (2 if dtype == "bool" else 256)
    expected = numbers.size / values.size
    assert np.sum((counts - expected) ** 2 / expected) < values.size + 6 * np.sqrt(2 * values.size)


def test_extreme_words_become_the_extreme_floats(real_compiling_device, cpu):
    # Words that are 0 after the shift give exactly 0; enough numbers of few bits hold both ends.
    for device in (real_compiling_device, cpu):
        numbers = filled(device, "float16", 40_000, 3)
        assert numbers.min() == 0
        assert numbers.max() == 1 - 2**-11


def test_seeds_make_other_streams(cpu):
    assert len({filled(cpu, "u8", 4, seed).tobytes() for seed in (0, 1, 2**32, 2**63, 2**64 - 1)}) == 5


def test_many_numbers_by_threads_are_those_of_one(cpu):
    count = 3 * limits.RANDOM_BLOCKS_AT_ONCE_COUNT * 4 + 5
    whole = filled(cpu, "float32", count, 9)
    start = 2 * limits.RANDOM_BLOCKS_AT_ONCE_COUNT
    counters = np.arange(start, start + 2, dtype=np.uint64)
    zero = np.zeros_like(counters)
    words = np.stack(philox((counters, zero, zero, zero), 9), axis=1).reshape(-1)
    assert (whole[start * 4 : start * 4 + 8] == (words >> np.uint64(8)) * 2.0**-24).all()


def test_devices_without_a_language_get_them_from_the_host(monkeypatch):
    monkeypatch.setattr(limits, "HOST_STEP_BYTES", 1024)

    class Plain(CpuDevice):
        """A backend of another package: memory of its own, and nothing that is compiled."""

        def __init__(self):
            super().__init__()
            self.capabilities = DeviceCapabilities(dtypes=frozenset({"float32"}))

    assert (filled(Plain(), "float32", 1000, 3) == filled(CpuDevice(), "float32", 1000, 3)).all()
    pretended = NullDevice(language="")
    fill_random(pretended.allocate(4000), "float32", 1000, 3)
    assert pretended.counts["write_bytes"] == 4000


@pytest.mark.parametrize(
    ("dtype", "count", "seed", "why"),
    [
        ("complex64", 1, 0, "no random numbers of dtype complex64"),
        (">f4", 1, 0, "no random numbers of dtype >f4"),
        ("f4", 1, -1, "seed is -1"),
        ("f4", 1, 2**64, "seed is 18446744073709551616"),
        ("f4", 5, 0, "do not fit"),
        ("f4", -1, 0, "do not fit"),
    ],
)
def test_what_cannot_be_filled_is_refused(device, dtype, count, seed, why):
    with pytest.raises(UsageError, match=why):
        fill_random(device.allocate(16), dtype, count, seed)
