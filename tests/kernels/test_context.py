"""A context chooses devices, shares work among them, says why, and what it took."""

from __future__ import annotations

import gc
import json
import threading
import weakref

import numpy as np
import pytest

import sparkle_mesh as sparkle
from sparkle_mesh import limits
from sparkle_mesh.context import Context
from sparkle_mesh.devices.cpu import CpuBackend
from sparkle_mesh.devices.null import NullBackend
from sparkle_mesh.devices.profiles import ProfileStore
from sparkle_mesh.devices.registry import Registry
from sparkle_mesh.errors import (
    ClosedError,
    DeadlineError,
    KernelError,
    KernelStoppedError,
    OutOfMemoryError,
    TraceError,
    UsageError,
)
from sparkle_mesh.kernels.array import Array
from sparkle_mesh.kernels.estimate import Speed
from sparkle_mesh.kernels.pending import Submissions
from sparkle_mesh.kernels.tracing import kernel
from sparkle_mesh.kernels.turns import Turns


@kernel
def curve(x, y):
    return np.tanh(2 * x + y * y) * x


@kernel
def sums(x):
    return {"rows": x.sum(axis=1), "all": (x * x).sum(), "most": x.max(axis=0)}


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


# --- Running --------------------------------------------------------------------------------------


def test_kernels_run_on_the_device_that_is_told(two_devices):
    x, y = drawn(30, 40), drawn(40, seed=1)
    for device in two_devices.devices:
        found = two_devices.run(curve, x, y, device=device)
        assert found.devices == (str(device),)
        np.testing.assert_allclose(found.to_numpy(), np.tanh(2 * x + y * y) * x, rtol=1e-6)
    assert two_devices.run(curve, x, y, device="second").device == "second:0"


def test_kernels_called_by_themselves_run_on_the_context_and_give_what_they_were_given(context):
    before = sparkle.kernel(lambda x: x + 1)
    with sparkle.init([], data_dir="unused") as current:
        assert isinstance(before(drawn(3)), np.ndarray)
        assert isinstance(before(current.asarray(drawn(3))), Array)
        found = sums(drawn(3, 4))
        assert set(found) == {"rows", "all", "most"}
        assert all(isinstance(value, np.ndarray) for value in found.values())
        found["rows"][0] = 5.0
        with current.profile() as profile:
            sums(drawn(3, 4))
        assert [event.name for event in profile.events] == ["sums"]
    # Without a context NumPy does it.
    assert isinstance(before(drawn(3)), np.ndarray)


def test_results_have_the_structure_that_the_function_returns(context):
    x = drawn(5, 6)
    found = context.run(sums, x)
    np.testing.assert_allclose(found["rows"].to_numpy(), x.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["all"].item(), (x * x).sum(), rtol=1e-5)
    np.testing.assert_allclose(found["most"].to_numpy(), x.max(axis=0))


def test_matrix_products(context):
    a, b = drawn(20, 30), drawn(30, 10, seed=1)
    np.testing.assert_allclose(context.gemm(a, context.asarray(b)).to_numpy(), a @ b, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_run_says_so(context):
    with pytest.raises(TraceError, match=r"test_context.py:\d+"):
        context.run(lambda x: x if x > 0 else -x, drawn(3))
    with pytest.raises(KernelError, match="do not fit each other"):
        context.run(curve, drawn(3), drawn(4))
    with pytest.raises(UsageError, match="there is no device 'cuda' here; there are cpu:0"):
        context.run(curve, drawn(3), drawn(3), device="cuda")
    with pytest.raises(UsageError, match="there is no device 'tpu:1' here"):
        context.array((3,), device="tpu:1")
    with pytest.raises(KernelStoppedError, match="before it ran"):
        context.run(curve, drawn(3), drawn(3), should_stop=lambda: True)


def test_many_threads_run_at_once(two_devices):
    x, y = drawn(200, 50), drawn(50)
    wanted = np.tanh(2 * x + y * y) * x
    wrong = []

    def run(number):
        for _ in range(10):
            found = two_devices.run(curve, x, y, device=two_devices.devices[number % 2], priority=number)
            if not np.allclose(found.to_numpy(), wanted, rtol=1e-5):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- Memory ---------------------------------------------------------------------------------------


def test_buffers_are_where_there_is_room_and_the_memory_is_fastest(open_context):
    context = open_context(memory=1e9)
    assert context.allocate(10).device is context.host
    fast = open_context(memory=1e12)
    assert str(fast.allocate(10, "float64").device) == "second:0"
    assert str(fast.array((2, 3)).device) == "second:0"
    assert fast.allocate(10, device="cpu").device is fast.host
    with pytest.raises(OutOfMemoryError, match=r"(cpu|second):0"):
        fast.allocate(1 << 60)


def test_zeros_of_any_shape(context):
    assert context.array(3, "int8").tolist() == [0, 0, 0]
    assert context.array(()).item() == 0.0
    assert context.array((0, 4)).shape == (0, 4)
    with pytest.raises(KernelError, match="complex64"):
        context.array(3, "complex64")


def test_as_array_takes_what_numpy_takes(two_devices):
    array = two_devices.asarray([[1, 2], [3, 4]], "float32", device="second")
    assert (array.dtype, array.device) == (np.dtype("float32"), "second:0")
    assert two_devices.asarray(array) is array
    assert two_devices.asarray(array, "float64").dtype == np.float64
    assert two_devices.asarray(array, device="cpu").devices == ("second:0", "cpu:0")


# --- Choosing -------------------------------------------------------------------------------------


def test_the_device_that_is_expected_to_be_faster_is_taken_and_explained(open_context):
    context = open_context(memory=1e12)
    x = context.asarray(drawn(1000, 100)).to_device("second")
    y = context.asarray(drawn(100)).to_device("second")
    explanation = context.explain(curve, x, y)
    assert explanation.chosen.name == "second:0"
    text = str(explanation)
    assert "kernel curve: float32[1000, 100], float32[100] -> float32[1000, 100]" in text
    assert "-> second:0" in text
    assert "elementwise" in text
    assert context.run(curve, x, y).devices == ("second:0",)
    estimate = context.estimate_performance(curve, x, y, device="second")
    assert estimate.seconds < context.estimate_performance(curve, x, y, device="cpu").seconds


def test_what_was_measured_corrects_what_is_expected(two_devices):
    x = two_devices.asarray(drawn(300, 100))
    before = two_devices.estimate_performance(sums, x, device="cpu").correction
    for _ in range(2 * limits.TIMED_RUNS_COUNT):
        two_devices.run(sums, x, device="cpu")
    assert before == 1.0 != two_devices.estimate_performance(sums, x, device="cpu").correction
    assert "times what the roofline says" in str(two_devices.explain(sums, x))
    assert two_devices.estimate_performance(sums, x, device="second").correction == 1.0


def test_devices_that_hold_nothing_are_not_chosen_and_run_nothing(tmp_path):
    registry = Registry(extra=[NullBackend()], entry_points=list)
    with Context(["null"], data_dir=tmp_path, registry=registry) as context:
        assert [choice.name for choice in context.explain(curve, drawn(3), drawn(3)).choices] == ["cpu:0"]
        found = context.run(curve, drawn(1000, 3), drawn(3), device="null")
        assert (found.shape, found.device) == (((1000, 3)), "null:0")


# --- Sharing --------------------------------------------------------------------------------------


@pytest.fixture
def shares_everything(monkeypatch):
    monkeypatch.setattr(limits, "SHARED_WORK_MIN_S", 0.0)
    monkeypatch.setattr(limits, "SHARED_GAIN_MAX_RATIO", 10.0)


@pytest.mark.usefixtures("shares_everything")
def test_unequal_devices_share_one_kernel(open_context):
    context = open_context(memory=8e9)
    x, y = drawn(64_000, 20), drawn(20)
    choice = context.explain(curve, x, y).choices
    shared = next(one for one in choice if one.parts)
    assert shared.name == "cpu:0 + second:0"
    assert "shared: cpu:0" in str(context.explain(curve, x, y))
    for _ in range(3):
        found = context._runtime.run_shared(
            curve.trace(x, y), (x, y), context._order("curve", "auto", 0, lambda: False), shared
        )
        np.testing.assert_allclose(found[0].to_numpy(), np.tanh(2 * x + y * y) * x, rtol=1e-6)
    shares = context._runtime.last_shares
    assert set(shares) == {"cpu:0", "second:0"}
    assert sum(share.length for share in shares.values()) == 64_000
    assert found[0].device == "cpu:0"


@pytest.mark.usefixtures("shares_everything")
def test_sums_of_parts_are_put_together(two_devices):
    x = drawn(6400, 30)
    graph = sums.trace(x)
    (shared,) = (one for one in two_devices.explain(sums, x).choices if one.parts)
    order = two_devices._order("sums", "auto", 0, lambda: False)
    call = sums.prepare(x)
    found = call.rebuild(two_devices._runtime.run_shared(graph, (x,), order, shared))
    np.testing.assert_allclose(found["rows"].to_numpy(), x.sum(axis=1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["all"].item(), (x * x).sum(), rtol=1e-5)
    np.testing.assert_array_equal(found["most"].to_numpy(), x.max(axis=0))


def test_sums_of_float16_in_parts_are_added_up_in_float32(two_devices):
    x = np.full((6400, 2), 0.1, "float16")
    total = kernel(lambda x: x.sum(axis=0))
    found = two_devices.run(total, x, device=two_devices.devices)
    np.testing.assert_allclose(found.to_numpy(), x.astype("float32").sum(axis=0), rtol=2e-3)
    assert found.dtype == np.float16


@pytest.mark.usefixtures("shares_everything")
def test_columns_of_a_product_are_shared_too(two_devices):
    a, b = drawn(50, 40), drawn(640, 40, seed=1)
    product = kernel(lambda a, b: a @ b.T)
    (shared,) = (one for one in two_devices.explain(product, a, b).choices if one.parts)
    order = two_devices._order("product", "auto", 0, lambda: False)
    (found,) = two_devices._runtime.run_shared(product.trace(a, b), (a, b), order, shared)
    np.testing.assert_allclose(found.to_numpy(), a @ b.T, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("shares_everything")
def test_shared_work_stops_when_it_is_told(two_devices):
    x, y = drawn(64_000, 20), drawn(20)
    asked = []

    def should_stop():
        asked.append(1)
        return len(asked) > 6

    with pytest.raises(KernelStoppedError):
        two_devices.run(curve, x, y, should_stop=should_stop)


# --- In the background ----------------------------------------------------------------------------


def test_submitted_kernels_run_and_can_be_waited_for(context):
    x, y = drawn(30, 40), drawn(40)
    pending = [context.submit(curve, x, y, priority=number) for number in range(5)]
    for one in pending:
        np.testing.assert_allclose(one.result(30.0).to_numpy(), np.tanh(2 * x + y * y) * x, rtol=1e-6)
        assert one.done()
    with pytest.raises(KernelError):
        context.submit(curve, drawn(3), drawn(4)).result(30.0)


@pytest.fixture
def one_thread():
    submissions = Submissions(1)
    yield submissions
    submissions.close()


def test_the_most_urgent_comes_first_and_what_is_cancelled_does_not_run(one_thread):
    running, go_on, order = threading.Event(), threading.Event(), []

    def hold(should_stop):
        running.set()
        assert go_on.wait(30.0)

    held = one_thread.submit(hold, 0)
    assert running.wait(30.0)
    late = [one_thread.submit(lambda should_stop, number=number: order.append(number), number) for number in (1, 3, 2)]
    cancelled = one_thread.submit(lambda should_stop: order.append("cancelled"), 9)
    cancelled.cancel()
    with pytest.raises(DeadlineError, match=r"not done after 0\.01 s; it goes on"):
        late[0].result(0.01)
    assert not late[0].done()
    go_on.set()
    for one in (held, *late):
        one.result(30.0)
    with pytest.raises(KernelStoppedError, match="cancelled before it ran"):
        cancelled.result(30.0)
    assert order == [3, 2, 1]


def test_too_many_are_refused(one_thread, monkeypatch):
    monkeypatch.setattr(limits, "SUBMITTED_MAX_COUNT", 1)
    go_on = threading.Event()
    running = threading.Event()

    def hold(should_stop):
        running.set()
        assert go_on.wait(30.0)

    one_thread.submit(hold, 0)
    assert running.wait(30.0)
    one_thread.submit(lambda should_stop: None, 0)
    with pytest.raises(UsageError, match="1 kernels wait already"):
        one_thread.submit(lambda should_stop: None, 0)
    go_on.set()


def test_a_running_kernel_stops_at_the_next_piece(one_thread):
    started = threading.Event()

    def stop(should_stop):
        started.set()
        while not should_stop():
            pass
        raise KernelStoppedError("stopped")

    pending = one_thread.submit(stop, 0)
    assert started.wait(30.0)
    pending.cancel()
    with pytest.raises(KernelStoppedError):
        pending.result(30.0)


def test_closing_waits_for_what_was_submitted(tmp_path):
    context = Context([], data_dir=tmp_path, registry=Registry(entry_points=list))
    go_on, running = threading.Event(), threading.Event()

    def hold(should_stop):
        running.set()
        assert go_on.wait(30.0)

    for _ in range(context._submissions.threads):
        running.clear()
        context._submissions.submit(hold, 0)
        assert running.wait(30.0)
    pending = context.submit(curve, drawn(3), drawn(3))
    closing = threading.Thread(target=context.close)
    closing.start()
    go_on.set()
    assert pending.result(30.0).shape == (3,)
    closing.join()


def test_two_at_once_have_a_thread_each():
    submissions, both = Submissions(2), threading.Barrier(2)
    warm = [submissions.submit(lambda should_stop: None, 0)]
    warm[0].result(30.0)
    pending = [submissions.submit(lambda should_stop: both.wait(30.0), 0) for _ in range(2)]
    assert sorted(one.result(30.0) for one in pending) == [0, 1]
    submissions.close()


def test_what_is_done_keeps_nothing_that_it_computed_with(one_thread):
    class Large:
        pass

    large = Large()
    seen = weakref.ref(large)
    pending = one_thread.submit(lambda should_stop, large=large: 1, 0)
    del large
    assert pending.result(30.0) == 1
    one_thread.submit(lambda should_stop: None, 0).result(30.0)
    gc.collect()
    assert seen() is None


def test_one_that_is_interrupted_while_it_waits_does_not_stand_before_the_others():
    turns = Turns()

    class Interrupted(BaseException):
        pass

    def interrupted(predicate):
        raise Interrupted

    with turns.turn():
        wait_for, turns._condition.wait_for = turns._condition.wait_for, interrupted
        with pytest.raises(Interrupted), turns.turn(5):
            pass
        turns._condition.wait_for = wait_for
    with turns.turn():
        pass


# --- Profiles -------------------------------------------------------------------------------------


def test_a_profile_tells_what_ran_where(two_devices, tmp_path):
    x, y = drawn(30, 40), drawn(40)
    with two_devices.profile() as profile:
        two_devices.run(curve, x, y, device="cpu")
        two_devices.run(curve, x, y, device="second")
        two_devices.run(curve, x, y, device="second")
    two_devices.run(curve, x, y, device="cpu")
    assert [(event.name, event.device) for event in profile.events] == [
        ("curve", "cpu:0"),
        ("curve", "second:0"),
        ("curve", "second:0"),
    ]
    table = str(profile)
    assert "second:0" in table
    assert table == profile.table()
    profile.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["ph"] for event in events] == ["M", "M", "X", "X", "X"]
    assert {event["args"]["name"] for event in events[:2]} == {"cpu:0", "second:0"}
    assert all(event["dur"] > 0 and event["args"]["bytes"] > 0 for event in events[2:])


# --- Life -----------------------------------------------------------------------------------------


def test_closed_it_takes_nothing_more(tmp_path):
    context = Context([], data_dir=tmp_path, registry=Registry(entry_points=list))
    assert repr(context) == "<Context of cpu:0>"
    array = context.asarray(drawn(3))
    with context:
        pass
    context.close()
    for call in (
        lambda: context.run(curve, drawn(3), drawn(3)),
        lambda: context.array(3),
        lambda: context.asarray([1]),
        lambda: context.allocate(3),
        lambda: context.submit(curve, drawn(3), drawn(3)),
        lambda: array + 1,
    ):
        with pytest.raises(ClosedError, match="closed"):
            call()
    with pytest.raises(ClosedError):
        context._submissions.submit(lambda should_stop: None, 0)


def test_arrays_of_another_context_are_copied(open_context):
    one, other = open_context(second=False), open_context(second=False)
    array = one.asarray(drawn(3))
    taken = other.asarray(array)
    assert taken is not array
    one.close()
    assert (taken + 1).shape == (3,)
    with pytest.raises(UsageError, match="is not of this context"):
        other.device(CpuBackend().devices()[0])


def test_a_registry_that_is_given_is_its_owners(tmp_path):
    registry = Registry(entry_points=list)
    first = Context([], data_dir=tmp_path, registry=registry)
    second = Context([], data_dir=tmp_path, registry=registry)
    first.close()
    assert registry.devices()[0] is second.host
    assert second.run(curve, drawn(3), drawn(3)).shape == (3,)
    second.close()
    registry.close()


def test_a_device_that_is_told_is_not_measured_for_it(tmp_path, monkeypatch):
    def measured(self, device):
        raise AssertionError("nobody asked")

    monkeypatch.setattr(ProfileStore, "profile", measured)
    with Context(["null"], data_dir=tmp_path, registry=Registry(extra=[NullBackend()], entry_points=list)) as context:
        for _ in range(3):
            context.run(curve, drawn(3), drawn(3), device="cpu")
        with context.profile() as profile:
            context.run(curve, drawn(3), drawn(3), device="cpu")
    assert [set(event.details) for event in profile.events] == [{"bytes", "flops"}]


def test_what_is_on_another_device_takes_time_to_fetch(tmp_path, monkeypatch):
    speed = Speed({}, 1e9, to_device_bytes_per_s=1e6, from_device_bytes_per_s=2e6, launch_s=0.0)
    with Context(["null"], data_dir=tmp_path, registry=Registry(extra=[NullBackend()], entry_points=list)) as context:
        runtime, null = context._runtime, context.device("null")
        monkeypatch.setattr(runtime, "_speed", lambda device: speed)
        far, near = context.array((250,), device="null"), context.array((250,), device="cpu")
        assert runtime._gather_s(far, 1000, null) == 0.0
        # Back from there; then to where it is needed.
        assert runtime._gather_s(far, 1000, context.host) == pytest.approx(1000 / 2e6 + 1000 / 1e6)
        assert runtime._gather_s(near, 1000, null) == pytest.approx(1000 / 1e6)
        assert runtime._gather_s(drawn(250), 1000, null) == pytest.approx(1000 / 1e6)


def test_devices_are_measured_once(tmp_path):
    with Context([], data_dir=tmp_path, registry=Registry(entry_points=list)) as context:
        profile = context.device_profile("cpu")
        assert profile.memory_bytes_per_s > 0
        context.synchronize()
    with Context([], data_dir=tmp_path, registry=Registry(entry_points=list)) as again:
        assert again.device_profile("cpu") == profile
