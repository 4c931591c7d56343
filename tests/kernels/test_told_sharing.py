"""Several devices that are told to share a kernel do, where it can be done in parts."""

from __future__ import annotations

import numpy as np
import pytest

from sparkle_mesh.errors import UsageError
from sparkle_mesh.kernels.tracing import kernel


@kernel
def curve(x, y):
    return np.tanh(2 * x + y) * x


@kernel
def corner(x):
    return x[0, 0] + 1.0


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def test_devices_that_are_told_share_even_little_work(two_devices):
    x, y = drawn(640, 3), drawn(3, seed=1)
    for told in (two_devices.devices, ["second", "cpu"], ("cpu:0", "second:0", "second")):
        with two_devices.profile() as seen:
            found = two_devices.run(curve, x, y, device=told)
        np.testing.assert_allclose(found.to_numpy(), np.tanh(2 * x + y) * x, rtol=1e-6)
        assert {event.category for event in seen.events} == {"part"}
    assert sum(share.length for share in two_devices._runtime.last_shares.values()) == 640


def test_submitted_work_is_shared_too(two_devices):
    x, y = drawn(640, 3), drawn(3, seed=1)
    found = two_devices.submit(curve, x, y, device=two_devices.devices).result(30.0)
    np.testing.assert_allclose(found.to_numpy(), np.tanh(2 * x + y) * x, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (1, 1)])
def test_what_is_too_little_to_share_is_done_by_one(two_devices, shape):
    x, y = drawn(*shape), drawn(shape[1])
    found = two_devices.run(curve, x, y, device=["cpu", "second"])
    np.testing.assert_allclose(found.to_numpy(), np.tanh(2 * x + y) * x, rtol=1e-6)


def test_what_cannot_be_cut_is_done_by_one(two_devices):
    with two_devices.profile() as seen:
        assert two_devices.run(corner, drawn(9, 9), device=two_devices.devices).item() == drawn(9, 9)[0, 0] + 1.0
    assert [event.category for event in seen.events] == ["kernel"]


def test_one_of_a_list_is_that_one(two_devices):
    assert two_devices.run(curve, drawn(3, 3), drawn(3), device=["second"]).device == "second:0"
    assert two_devices.run(curve, drawn(3, 3), drawn(3), device=["second", "second:0"]).device == "second:0"


def test_wrong_lists_say_what_is_wrong(two_devices):
    with pytest.raises(UsageError, match="name at least one"):
        two_devices.run(curve, drawn(3, 3), drawn(3), device=[])
    with pytest.raises(UsageError, match="no device 'third'"):
        two_devices.run(curve, drawn(3, 3), drawn(3), device=["cpu", "third"])


def test_what_making_ready_takes_is_not_held_against_a_device(two_devices):
    """Compiling takes a hundred times as long as running, and is done once."""
    x = drawn(300, 100)
    with two_devices.profile():
        two_devices.run(curve, x, drawn(100), device="second")
    assert two_devices.estimate_performance(curve, x, drawn(100), device="second").correction == 1.0
    with two_devices.profile():
        two_devices.run(curve, x, drawn(100), device="second")
    assert two_devices.estimate_performance(curve, x, drawn(100), device="second").correction != 1.0
