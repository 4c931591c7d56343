"""The memory pool: what it keeps, for how long, and what it does when the device has no more."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.devices.cpu import CpuDevice
from sparkle_mesh.devices.null import NullDevice
from sparkle_mesh.devices.pool import MemoryPool, block_bytes
from sparkle_mesh.errors import OutOfMemoryError

KIB = 1024


@given(st.integers(0, 2**50))
def test_sizes_are_rounded_up_by_little(nbytes):
    size = block_bytes(nbytes)
    assert nbytes <= size <= max(nbytes + limits.POOL_BLOCK_MIN_BYTES, nbytes * 9 / 8)
    assert block_bytes(size) == size


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=2).map(sorted))
def test_sizes_grow(sizes):
    assert block_bytes(sizes[0]) <= block_bytes(sizes[1])


def test_there_are_few_sizes():
    assert len({block_bytes(nbytes) for nbytes in range(2**14, 2**15)}) == limits.POOL_SIZES_PER_OCTAVE_COUNT + 1


def test_a_freed_block_is_handed_out_again(device):
    pool = device.pool
    first = pool.allocate(1000)
    pool.free(first)
    assert pool.kept_bytes == first.nbytes
    assert pool.allocate(1001) is first
    assert pool.kept_bytes == 0
    assert pool.allocate(1001) is not first
    assert not first.freed


def test_the_youngest_block_comes_first():
    pool = NullDevice().pool
    blocks = [pool.allocate(500) for _ in range(3)]
    for block in blocks:
        pool.free(block)
    assert [pool.allocate(500) for _ in range(3)] == blocks[::-1]


def test_blocks_of_other_sizes_stay():
    device = NullDevice()
    small, large = device.pool.allocate(KIB), device.pool.allocate(64 * KIB)
    device.pool.free(small)
    device.pool.free(large)
    assert device.pool.allocate(64 * KIB) is large
    assert device.pool.kept_bytes == KIB


def test_what_is_beyond_the_bound_goes_oldest_first():
    device = NullDevice()
    pool = MemoryPool(device, kept_max_bytes=4 * KIB)
    blocks = [pool.allocate(KIB) for _ in range(6)]
    huge = pool.allocate(5 * KIB)
    for block in (*blocks, huge):
        pool.free(block)
    assert pool.kept_bytes == 4 * KIB
    assert [block.freed for block in blocks] == [True, True, False, False, False, False]
    assert huge.freed


def test_the_bound_is_a_part_of_the_devices_memory():
    device = NullDevice(memory_bytes=64 * KIB)
    blocks = [device.pool.allocate(8 * KIB) for _ in range(4)]
    for block in blocks:
        device.pool.free(block)
    assert device.pool.kept_bytes == 64 * KIB * limits.POOL_KEPT_RATIO


def test_blocks_of_no_size_of_the_pool_are_not_kept(cpu):
    odd = cpu.allocate(100)
    before = cpu.pool.kept_bytes
    cpu.pool.free(odd)
    assert odd.freed
    assert cpu.pool.kept_bytes == before


def test_a_full_device_gets_the_kept_blocks_back():
    device = NullDevice(memory_bytes=64 * KIB)
    kept = device.pool.allocate(16 * KIB)
    device.pool.free(kept)
    large = device.pool.allocate(60 * KIB)
    assert kept.freed
    assert large.nbytes <= 64 * KIB
    assert device.counts["allocate"] == 2


def test_what_fits_is_not_refused_for_the_sake_of_rounding():
    device = NullDevice(memory_bytes=64 * KIB)
    kept = device.pool.allocate(KIB)
    exact = device.pool.allocate(62 * KIB)
    assert exact.nbytes == 62 * KIB
    device.pool.free(exact)
    assert exact.freed
    with pytest.raises(OutOfMemoryError):
        device.pool.allocate(64 * KIB)
    device.pool.free(kept)
    assert device.pool.allocate(64 * KIB).nbytes == 64 * KIB


class Copies:
    """Holds blocks that it could do without."""

    def __init__(self, pool, sizes):
        self.pool, self.blocks = pool, [pool.allocate(size) for size in sizes]
        self.asked = []

    def reclaimable_bytes(self, device):
        return sum(block.nbytes for block in self.blocks)

    def reclaim(self, device, nbytes):
        self.asked.append(nbytes)
        given = 0
        while self.blocks and given < nbytes:
            block = self.blocks.pop()
            given += block.nbytes
            self.pool.free(block)
        return given


def test_copies_of_what_is_elsewhere_make_room():
    device = NullDevice(memory_bytes=64 * KIB)
    first, second = Copies(device.pool, [16 * KIB]), Copies(device.pool, [16 * KIB, 16 * KIB])
    device.pool.add_reclaimer(first)
    device.pool.add_reclaimer(second)
    device.pool.free(device.pool.allocate(8 * KIB))
    assert device.pool.allocate(32 * KIB)
    assert (first.asked, second.asked) == ([32 * KIB], [16 * KIB])
    assert len(second.blocks) == 1
    device.pool.remove_reclaimer(second)
    with pytest.raises(OutOfMemoryError):
        device.pool.allocate(32 * KIB)


def test_a_full_device_says_what_it_has():
    device = NullDevice(memory_bytes=64 * KIB)
    copies = Copies(device.pool, [8 * KIB])
    kept = device.pool.allocate(8 * KIB)
    device.pool.free(kept)
    held = device.pool.allocate(16 * KIB)
    device.pool.add_reclaimer(copies)
    with pytest.raises(OutOfMemoryError) as caught:
        device.allocate(60 * KIB)
    message = str(caught.value)
    sizes = ("61440 bytes", "32768 are free", "24576 in use", "8192 freed and kept", "8192 in copies")
    for part in ("null:0 (nothing)", *sizes):
        assert part in message
    with pytest.raises(OutOfMemoryError, match="0 freed and kept"):
        device.pool.allocate(60 * KIB)
    assert copies.blocks == []
    assert not held.freed


def test_finalizers_may_free_in_the_midst_of_anything():
    device = NullDevice()
    pool = MemoryPool(device, kept_max_bytes=8 * KIB)

    class Owner:
        def __init__(self):
            self.memory = pool.allocate(KIB)
            self.cycle = self

        def __del__(self):
            pool.free(self.memory)

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            Owner()
            pool.free(pool.allocate(2 * KIB))
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert pool.kept_bytes <= 8 * KIB
    assert device.allocated_bytes == pool.kept_bytes


def test_a_finalizer_that_meets_the_lock_leaves_its_block_to_the_next_call():
    device = NullDevice()
    pool = device.pool
    memory = pool.allocate(KIB)
    with pool._lock:
        pool.free(memory)
        assert not memory.freed
    assert pool.kept_bytes == KIB


def test_threads_share_it():
    device = CpuDevice()

    def use(number):
        for step in range(200):
            size = KIB * (1 + (number + step) % 5)
            memory = device.pool.allocate(size)
            memory.native[:] = number
            assert (memory.native == number).all()
            device.pool.free(memory)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert device.pool.in_use_bytes == 0
    device.pool.empty()
    assert device.allocated_bytes == 0


def test_what_is_too_large_even_when_all_is_given_back():
    device = NullDevice(memory_bytes=64 * KIB)
    device.pool.free(device.pool.allocate(KIB))
    first, second = Copies(device.pool, [2 * KIB]), Copies(device.pool, [KIB])
    device.pool.add_reclaimer(first)
    device.pool.add_reclaimer(second)
    held = device.pool.allocate(16 * KIB)
    device.pool.free(device.pool.allocate(KIB))
    with pytest.raises(OutOfMemoryError):
        device.pool.allocate(60 * KIB)
    assert (first.asked, second.asked) == ([60 * KIB], [58 * KIB])
    device.pool.free(device.pool.allocate(KIB))
    with pytest.raises(OutOfMemoryError, match=f"{16 * KIB} in use here, 0 freed and kept"):
        device.pool.allocate(60 * KIB)
    assert not held.freed
    device.pool.remove_reclaimer(first)
    third = Copies(device.pool, [KIB])
    device.pool.add_reclaimer(Copies(device.pool, [32 * KIB]))
    device.pool.add_reclaimer(third)
    assert device.pool.allocate(32 * KIB)
    assert third.asked == []
