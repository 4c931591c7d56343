"""Work is done once each, by whoever has time for it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh.errors import KernelStoppedError
from sparkle_mesh.kernels.sharing import Sharing, first_parts


@dataclass
class Counter:
    """A worker that notes what it was given; with an event it waits for that before its first range ends."""

    rate: float = 1.0
    overhead_s: float = 0.0
    waits_for: threading.Event | None = None
    sets: threading.Event | None = None
    done: list[tuple[int, int]] = field(default_factory=list)

    def run(self, start: int, stop: int) -> None:
        if self.waits_for is not None:
            assert self.waits_for.wait(10.0)
        self.done.append((start, stop))
        if self.sets is not None:
            self.sets.set()


def covered(*workers: Counter) -> list[int]:
    return sorted(place for worker in workers for start, stop in worker.done for place in range(start, stop))


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 10)), min_size=1, max_size=5),
    st.integers(1, 100),
)
def test_first_parts_are_all_of_it(length: int, workers: list[tuple[float, float]], grain: int) -> None:
    counts = first_parts(length, [rate for rate, _ in workers], [overhead for _, overhead in workers], grain)
    assert sum(counts) == length
    assert min(counts) >= 0


def test_first_parts_end_together_and_who_would_not_help_gets_nothing():
    assert first_parts(900, [2.0, 1.0], [0.0, 0.0], 1) == [600, 300]
    assert first_parts(900, [2.0, 1.0], [0.0, 30.0], 1) == [620, 280]
    assert first_parts(900, [2.0, 1.0], [0.0, 500.0], 1) == [900, 0]
    assert first_parts(900, [2.0, 0.01], [0.0, 0.0], 50) == [900, 0]


@given(st.integers(1, 2000), st.integers(1, 4), st.integers(1, 50))
def test_all_is_done_once(length: int, count: int, grain: int) -> None:
    workers = [Counter(rate=number + 1.0) for number in range(count)]
    shares = Sharing(length, workers, grain=grain).run()
    assert covered(*workers) == list(range(length))
    assert sum(share.length for share in shares) == length


def test_who_is_done_takes_from_who_is_not():
    others_turn = threading.Event()
    # It is expected to be as fast, and does not come to an end.
    slow, fast = Counter(waits_for=others_turn), Counter()

    class Last(Counter):
        def run(self, start: int, stop: int) -> None:
            super().run(start, stop)
            if len(self.done) >= 4:
                others_turn.set()

    fast = Last()
    sharing = Sharing(900, [slow, fast])
    sharing.run()
    assert covered(slow, fast) == list(range(900))
    assert sharing.shares[1].stolen > 0
    assert sharing.shares[1].length > 450


@given(st.integers(1, 5000), st.lists(st.floats(0.5, 50), min_size=2, max_size=4), st.integers(1, 80))
def test_ranges_have_few_lengths(length, rates, grain):
    sharing = Sharing(length, [Counter(rate=rate) for rate in rates], grain=grain)
    lengths = set()
    left = list(range(len(rates)))
    while left:
        # In turns, so that those with small parts take from the others.
        left = [number for number in left if (taken := sharing.take(number)) and not lengths.add(taken[1] - taken[0])]
    powers = {grain << bits for bits in range(14)}
    assert lengths <= {*powers, length % grain, min(length, grain)}


def test_what_would_not_pay_is_not_taken():
    sharing = Sharing(100, [Counter(rate=1000.0), Counter(rate=0.001, overhead_s=1000.0)])
    assert sharing.take(1) is None
    assert sharing.take(0) is not None


def test_an_error_comes_out_and_the_others_stop():
    class Broken(Counter):
        def run(self, start: int, stop: int) -> None:
            raise RuntimeError("no such device any more")

    with pytest.raises(RuntimeError, match="no such device"):
        Sharing(100, [Counter(), Broken()]).run()
    with pytest.raises(RuntimeError, match="no such device"):
        Sharing(100, [Broken(), Counter()]).run()


def test_it_stops_when_it_is_told():
    worker = Counter()
    sharing = Sharing(1000, [worker], should_stop=lambda: len(worker.done) >= 2)
    with pytest.raises(KernelStoppedError):
        sharing.run()
    assert len(worker.done) == 2
