"""What happens to a context's work when operands are changed, processes fork, and calls are wrong."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest

import sparkle_mesh as sparkle
from sparkle_mesh.errors import ForkedProcessError, TraceError, UsageError


def held_back(context: Any) -> tuple[threading.Event, Any]:
    """Hold all of the context's devices until the event is set; return the thread that does, too."""
    release, held = threading.Event(), threading.Barrier(len(context.devices) + 1)

    def hold(device: Any) -> None:
        with context._runtime.turn(device):
            held.wait(10)
            release.wait(10)

    threads = [threading.Thread(target=hold, args=(device,)) for device in context.devices]
    for thread in threads:
        thread.start()
    held.wait(10)
    return release, threads


@pytest.mark.parametrize("device", ["cpu", "second"])
def test_what_is_done_to_operands_after_it_was_submitted_is_nothing_to_a_kernel(two_devices, device):
    plain, array = np.ones(1000, "float32"), two_devices.asarray(np.ones(1000, "float32"), device=device)
    release, threads = held_back(two_devices)
    runs = [two_devices.submit(lambda x: x * 3, one, device=device) for one in (plain, array)]
    plain[:] = 100
    array.copy_from(np.zeros(1000, "float32"))
    release.set()
    for thread in threads:
        thread.join()
    assert [set(run.result(10).tolist()) for run in runs] == [{3.0}, {3.0}]
    assert set(array.tolist()) == {0.0}
    array.fill_random(1)
    assert 0 < array.to_numpy().mean() < 1


def test_a_snapshot_leaves_its_array_what_it_has_when_others_are_shown_it(context):
    array = context.asarray(np.arange(5.0))
    before = array.snapshot()
    np.from_dlpack(array)[0] = 9.0
    assert array.tolist() == [9.0, 1.0, 2.0, 3.0, 4.0]
    assert before.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    # Whoever has been shown it may write at any time: a snapshot is a copy then.
    later = array.snapshot()
    np.from_dlpack(array)[1] = 8.0
    assert later.tolist() == [9.0, 1.0, 2.0, 3.0, 4.0]


def test_nothing_writes_through_the_view_of_an_array(context):
    array = context.asarray([1.0, 2.0, 3.0])
    with pytest.raises(UsageError, match="add cannot write into an Array"):
        np.add.at(array, 0, 10)
    plain = np.zeros(3)
    np.add.at(plain, [0, 1, 2], array)
    assert plain.tolist() == [1.0, 2.0, 3.0]
    assert array.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which this system has not")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_leaves_contexts_to_its_parent(tmp_path):
    @sparkle.kernel
    def double(x: Any) -> Any:
        return x * 2

    def check() -> None:
        with pytest.raises(ForkedProcessError, match="belongs to process"):
            context.run(double, np.ones(3))
        with pytest.raises(ForkedProcessError, match="is computed in process"):
            pending.result(5)
        assert type(double(np.ones(3))) is np.ndarray
        with sparkle.Context([], data_dir=tmp_path) as own:
            assert own.run(double, np.ones(3)).tolist() == [2.0] * 3

    with sparkle.init([], data_dir=tmp_path) as context:
        release, threads = held_back(context)
        pending = context.submit(double, np.ones(3))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                check()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        release.set()
        for thread in threads:
            thread.join()
        assert pending.result(10).tolist() == [2.0] * 3


@pytest.mark.parametrize("priority", ["a", None, 1.5, True])
def test_a_priority_is_a_whole_number(context, priority):
    with pytest.raises(UsageError, match="priority is"):
        context.run(lambda x: x, np.ones(3), priority=priority)


def test_wrong_calls_say_what_is_wrong(context):
    for wrong in (3, None):
        with pytest.raises(TraceError, match="is no function"):
            context.run(wrong, np.ones(3))
    with pytest.raises(UsageError, match="NumPy does not know"):
        context.allocate(3, "foo")
    for values, dtype in (([1], "foo"), ([[1], [1, 2]], None), (["x"], "float32"), ([300], "uint8")):
        with pytest.raises(UsageError, match="make no array"):
            context.asarray(values, dtype=dtype)
