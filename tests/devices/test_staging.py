"""Copies through pinned memory, over a bus that is told when to carry."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from sparkle_mesh import limits
from sparkle_mesh.devices.staging import Staging

STEP = 64


class Bus:
    """Carries bytes when a fence is waited for, not before: an array read or reused too early shows."""

    def __init__(self, pinned=limits.STAGING_BLOCKS_MAX_COUNT):
        self.lock = threading.Lock()
        self.pinned_left, self.pinned = pinned, []
        self.active = threading.local()
        self.most_waiting = self.waiting = 0
        self.fails_at = None
        self.carried = 0

    @contextmanager
    def activated(self):
        self.active.now = True
        yield
        self.active.now = False

    def pin(self, nbytes):
        assert self.active.now
        with self.lock:
            if not self.pinned_left:
                return None
            self.pinned_left -= 1
            self.pinned.append(np.zeros(nbytes, dtype=np.uint8))
            return self.pinned[-1]

    def start(self, target, source):
        assert self.active.now
        with self.lock:
            if self.fails_at is not None and self.carried >= self.fails_at:
                raise RuntimeError("the bus broke down")
            self.waiting += 1
            self.carried += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
        return Fence(self, target, source)

    def start_write(self, native, offset_bytes, host):
        return self.start(native[offset_bytes : offset_bytes + host.size], host)

    def start_read(self, native, offset_bytes, host):
        return self.start(host, native[offset_bytes : offset_bytes + host.size])


class Fence:
    def __init__(self, bus, target, source):
        self.bus, self.target, self.source, self.done = bus, target, source, False

    def synchronize(self):
        assert not self.done
        self.done = True
        np.copyto(self.target, self.source)
        with self.bus.lock:
            self.bus.waiting -= 1


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(limits, "STAGING_BLOCK_BYTES", STEP)


def random_bytes(size):
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("pinned", [0, 1, 3, limits.STAGING_BLOCKS_MAX_COUNT])
@pytest.mark.parametrize("size", [1, STEP, STEP + 1, 2 * STEP, 40 * STEP + 7])
def test_all_bytes_arrive(size, pinned):
    bus = Bus(pinned)
    staging = Staging(bus)
    array, memory = random_bytes(size), np.zeros(size + 20, dtype=np.uint8)
    staging.write(memory, array, 10)
    assert (memory[10 : 10 + size] == array).all()
    assert not memory[:10].any()
    assert not memory[10 + size :].any()
    back = np.zeros_like(array)
    staging.read(memory, back, 10)
    assert (back == array).all()
    assert bus.waiting == 0
    assert len(bus.pinned) <= pinned


def test_each_thread_fills_one_block_while_another_is_carried():
    bus = Bus()
    Staging(bus).write(np.zeros(100 * STEP, dtype=np.uint8), random_bytes(100 * STEP), 0)
    assert 2 <= bus.most_waiting <= limits.STAGING_BLOCKS_MAX_COUNT
    assert len(bus.pinned) <= limits.STAGING_BLOCKS_MAX_COUNT


def test_many_copies_share_few_blocks():
    bus = Bus()
    staging = Staging(bus)

    def copy(number):
        array, memory = random_bytes(20 * STEP + number), np.zeros(20 * STEP + number, dtype=np.uint8)
        for _ in range(5):
            staging.write(memory, array, 0)
            back = np.zeros_like(array)
            staging.read(memory, back, 0)
            assert (back == array).all()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(copy, range(12)))
    assert len(bus.pinned) <= limits.STAGING_BLOCKS_MAX_COUNT


@pytest.mark.parametrize("fails_at", [0, 1, 2, 5])
def test_blocks_come_back_after_a_failure(fails_at):
    bus = Bus()
    staging = Staging(bus)
    memory, array = np.zeros(20 * STEP, dtype=np.uint8), random_bytes(20 * STEP)
    for work in (staging.write, staging.read):
        bus.fails_at, bus.carried = fails_at, 0
        with pytest.raises(RuntimeError, match="broke down"):
            work(memory, array.copy(), 0)
        assert bus.waiting == 0
    bus.fails_at = None
    staging.write(memory, array, 0)
    assert (memory == array).all()
    assert staging._places.qsize() == limits.STAGING_BLOCKS_MAX_COUNT


def test_blocks_come_back_when_waiting_fails(monkeypatch):
    bus = Bus()
    staging = Staging(bus)

    def fail(fence):
        with bus.lock:
            bus.waiting -= 1
        raise RuntimeError("the copy failed")

    with monkeypatch.context() as patch:
        patch.setattr(Fence, "synchronize", fail)
        with pytest.raises(RuntimeError, match="the copy failed"):
            staging.write(np.zeros(20 * STEP, dtype=np.uint8), random_bytes(20 * STEP), 0)
    assert staging._places.qsize() == limits.STAGING_BLOCKS_MAX_COUNT


def test_closing_gives_the_blocks_back():
    bus = Bus(2 * limits.STAGING_BLOCKS_MAX_COUNT)
    staging = Staging(bus)
    array = random_bytes(10 * STEP)
    staging.write(array.copy(), array, 0)
    used = len(bus.pinned)
    staging.close()
    assert staging._places.qsize() == limits.STAGING_BLOCKS_MAX_COUNT
    staging.write(array.copy(), array, 0)
    assert len(bus.pinned) > used
