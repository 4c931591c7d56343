"""How measurements become figures."""

from __future__ import annotations

import argparse

import pytest


@pytest.fixture
def figures(load_benchmark):
    return load_benchmark("_figures")


@pytest.mark.parametrize(
    ("text", "nbytes"), [("64MiB", 2**26), ("16KiB", 2**14), ("1.5 kib", 1536), ("4096", 4096), ("1MB", 10**6)]
)
def test_sizes_are_read(figures, text, nbytes):
    assert figures.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MiB", "64XB", "-4", "0", "6", "4 MiB 4"])
def test_wrong_sizes_are_refused(figures, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"not a size|multiple of 4"):
        figures.parse_size(text)


def test_sizes_are_written(figures):
    assert [figures.format_size(n) for n in (100, 16 << 10, 64 << 20, 3 << 29, 1 << 30, 10**6)] == [
        "100 B",
        "16 KiB",
        "64 MiB",
        "1.5 GiB",
        "1 GiB",
        "976.56 KiB",
    ]


def test_seconds_are_written(figures):
    assert [figures.format_seconds(s) for s in (0.00123, 0.0123, 0.123)] == ["1.23 ms", "12.3 ms", "123 ms"]


def test_spread_of_known_samples(figures):
    assert figures.spread([float(n) for n in range(10, -1, -1)]) == {
        "min": 0.0,
        "p10": 1.0,
        "median": 5.0,
        "p90": 9.0,
        "max": 10.0,
    }
    assert set(figures.spread([3.0]).values()) == {3.0}
    assert figures.spread([1.0, 2.0])["p10"] == pytest.approx(1.1)


def test_ratio_is_above_one_when_ours_is_faster(figures):
    assert figures.ratio_per_round([[1.0, 1.0, 9.0], [4.0]], [[2.0], [2.0]]) == [2.0, 0.5]


def test_cpu_seconds_per_gb(figures):
    # Four ranks used 8 CPU seconds to reduce 10^9 bytes each, twice: one second a rank and gigabyte.
    assert figures.cpu_seconds_per_gb(8.0, ranks=4, nbytes=10**9, iterations=2) == 1.0


def test_table_is_aligned(figures):
    lines = figures.make_table(("a", "long"), [("123", "x")]).splitlines()
    assert lines == ["  a  long", "---------", "123     x"]
