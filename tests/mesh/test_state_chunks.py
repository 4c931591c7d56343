"""A training state as chunks: alike on all ranks, read and written in place, compared by numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.errors import UsageError
from sparkle_mesh.state_chunks import StateChunks
from tests.collectives.conftest import Immutable, Lender


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STATE_CHUNK_BYTES", 64)


def state(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "a": random.standard_normal((3, 7)),
        "b": random.standard_normal(5).astype(np.float32),
        "strided": random.standard_normal((6, 4))[::2, ::2],
        "empty": np.zeros((0, 3)),
        "count": np.array(seed),
        "bits": random.integers(0, 2, 9).astype(bool),
    }


def test_a_state_is_taken_over_chunk_by_chunk() -> None:
    mine, theirs = state(1), state(2)
    chunks, others = StateChunks(mine), StateChunks(theirs)
    assert chunks.layout == others.layout
    assert len(chunks) == -(-chunks.nbytes // 64) == len(others)
    assert sum(chunks.chunk_bytes(chunk) for chunk in range(len(chunks))) == chunks.nbytes
    for chunk in range(len(chunks)):
        chunks.write(chunk, others.read(chunk))
    assert (StateChunks(mine).digests() == others.digests()).all()
    for name, array in theirs.items():
        np.testing.assert_array_equal(mine[name], array)


def test_digests_name_the_chunks_that_differ() -> None:
    mine, theirs = state(1), state(1)
    theirs["a"][2, 6] += 1
    differ = np.flatnonzero((StateChunks(mine).digests() != StateChunks(theirs).digests()).any(axis=1))
    (chunk,) = differ
    assert StateChunks(mine).difference(chunk, StateChunks(theirs).read(chunk)) == pytest.approx(1.0)
    assert (StateChunks(mine).digests([0]) == StateChunks(mine).digests()[:1]).all()


@pytest.mark.parametrize(
    ("mine", "theirs", "largest"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([1.0, np.nan], [1.0, np.nan], 0.0),
        ([1.0, np.nan], [1.5, np.nan], 0.5),
        ([np.nan], [1.0], np.inf),
        ([1 + 1j], [1 - 1j], 2.0),
        ([3, -4], [3, 4], 8.0),
        ([True], [False], 1.0),
    ],
)
def test_the_largest_difference(mine: list[Any], theirs: list[Any], largest: float) -> None:
    one, other = StateChunks(np.array(mine)), StateChunks(np.array(theirs))
    assert one.difference(0, other.read(0)) == largest


@given(st.lists(st.integers(0, 40), max_size=6))
def test_chunks_cover_every_byte_once(sizes: list[int]) -> None:
    arrays = [np.arange(size, dtype=np.float64) for size in sizes]
    chunks = StateChunks(arrays)
    together = np.concatenate([chunks.read(chunk) for chunk in range(len(chunks))] or [np.zeros(0, np.uint8)])
    assert together.tobytes() == b"".join(array.tobytes() for array in arrays)


def test_nothing_is_a_state_too() -> None:
    chunks = StateChunks(None)
    assert (len(chunks), chunks.nbytes, chunks.describe()) == (0, 0, "nothing")
    assert chunks.layout != StateChunks(np.zeros(3)).layout


@pytest.mark.parametrize(
    "given_state", [{"step": 3}, np.array(["text"]), {"a": {"b": np.zeros(3)}}, np.array([object()])]
)
def test_what_is_no_state_is_refused(given_state: Any) -> None:
    with pytest.raises(UsageError):
        StateChunks(given_state)


def test_arrays_of_other_libraries_are_written_where_they_lie() -> None:
    mine = {"w": Lender(np.zeros((3, 4), np.float32).T), "b": np.zeros(2)}
    theirs = {"w": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.ones(2)}
    chunks, others = StateChunks(mine), StateChunks(theirs)
    assert chunks.layout == others.layout
    for chunk in range(len(chunks)):
        chunks.write(chunk, others.read(chunk))
    np.testing.assert_array_equal(mine["w"].array, theirs["w"])
    np.testing.assert_array_equal(mine["b"], theirs["b"])


def test_arrays_of_other_libraries_that_cannot_be_written_to_are_refused() -> None:
    with pytest.raises(UsageError, match="the value of 'w' is on a GPU, or cannot be written to"):
        StateChunks({"b": Lender(np.zeros(1)), "w": Immutable(np.zeros(1))})
