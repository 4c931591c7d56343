"""What is expected of a program follows from its bytes, its arithmetic, and what was measured before."""

from __future__ import annotations

import math

import pytest

from sparkle_mesh import limits
from sparkle_mesh.kernels.estimate import Corrections, Speed, estimate
from sparkle_mesh.kernels.fusion import fuse
from sparkle_mesh.kernels.graph import Graph, GraphBuilder, WeakScalar
from sparkle_mesh.kernels.ops import TensorType

SPEED = Speed({"float32": 100.0}, 10e9, 1e9, 2e9, 1e-6)
FREE = Speed({"float32": 100.0}, 10e9, math.inf, math.inf, 0.0)


def doubled(count: int) -> Graph:
    builder = GraphBuilder([TensorType((count,), "float32")])
    return builder.finish([builder.elementwise("multiply", 0, WeakScalar(2))])


def product(count: int) -> Graph:
    builder = GraphBuilder([TensorType((count, count), "float32")])
    return builder.finish([builder.matmul(0, 0)])


def test_what_moves_bytes_takes_as_long_as_the_memory():
    found = estimate(fuse(doubled(1_000_000)), SPEED)
    assert found.seconds == pytest.approx(8e6 / 10e9 + 1e-6)
    assert [(step.name, step.bound) for step in found.steps] == [("elementwise", "memory")]


def test_what_computes_takes_as_long_as_the_arithmetic():
    found = estimate(fuse(product(1000)), FREE)
    assert found.compute_s == pytest.approx(2e9 / 100e9)
    assert found.steps[0].bound == "arithmetic"


def test_what_is_small_takes_a_launch():
    found = estimate(fuse(doubled(10)), SPEED)
    assert found.steps[0].bound == "launch"
    assert found.seconds == pytest.approx(1e-6, rel=0.05)


def test_transfers_are_added():
    found = estimate(fuse(doubled(10)), SPEED, transfer_s=1.5)
    assert found.transfer_s == pytest.approx(1.5)
    assert found.seconds == found.transfer_s + found.compute_s
    corrected = found.corrected(2.0)
    assert (corrected.compute_s, corrected.transfer_s, corrected.correction) == (2 * found.compute_s, 1.5, 2.0)


def test_dtypes_that_were_not_measured_count_as_float32_and_devices_as_slow():
    assert SPEED.flops_per_s("float64") == 100e9
    assert Speed({}, 1.0, 1.0, 1.0, 0.0).flops_per_s("float32") == limits.UNMEASURED_FLOPS_PER_S


def test_a_form_is_the_same_at_every_size():
    assert doubled(10).form == doubled(20).form != product(10).form


def test_what_was_measured_corrects_what_is_expected():
    corrections = Corrections()
    one = doubled(10).form
    assert corrections.correction("cpu:0", one, 1000) == 1.0
    corrections.measured("cpu:0", one, 1000, 1.0, 2.0)
    assert corrections.correction("cpu:0", one, 1000) == 2.0
    for took_s in (3.0, 3.0, 400.0, 3.0):
        corrections.measured("cpu:0", one, 1000, 1.0, took_s)
    assert corrections.correction("cpu:0", one, 1000) == pytest.approx(3.0, rel=1e-3)
    # The nearest size that is known; another device and another form know nothing of it.
    corrections.measured("cpu:0", one, 10**9, 1.0, 5.0)
    assert corrections.correction("cpu:0", one, 10**8) == 5.0
    assert corrections.correction("cpu:0", one, 1) == pytest.approx(3.0, rel=1e-3)
    assert corrections.correction("cpu:1", one, 1000) == corrections.correction("cpu:0", one + 1, 1000) == 1.0
    # What cannot be compared says nothing.
    corrections.measured("cpu:1", one, 1000, 0.0, 2.0)
    assert corrections.correction("cpu:1", one, 1000) == 1.0


def test_corrections_are_bounded(monkeypatch):
    monkeypatch.setattr(limits, "COST_CORRECTIONS_MAX_COUNT", 2)
    corrections = Corrections()
    for number in range(3):
        corrections.measured("cpu:0", number, 1000, 1.0, 2.0)
    assert [corrections.correction("cpu:0", number, 1000) for number in range(3)] == [1.0, 2.0, 2.0]
