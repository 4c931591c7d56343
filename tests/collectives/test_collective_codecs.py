"""Codecs keep their bounds on any input, and themselves on any data; error feedback returns what they drop."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkle_mesh import limits
from sparkle_mesh.collectives.codec import Codec
from sparkle_mesh.collectives.codecs import CODECS, make_codec
from sparkle_mesh.collectives.feedback import ErrorFeedback
from sparkle_mesh.collectives.reduction import Array
from sparkle_mesh.errors import ProtocolError, UsageError

COUNTS = (0, 1, 2, 63, 64, 65, 255, 256, 257, 10000)
BLOCKWISE = ("int8", "int4")
FLOAT32_TOP = np.finfo(np.float32).max
GUARD = 0xA5


def encode(codec: Codec, values: Array) -> Array:
    """Encode between guard bytes, at an odd address."""
    count = codec.encoded_bytes(values.size)
    room = np.full(count + 64, GUARD, np.uint8)
    start = 33 - room.ctypes.data % 2
    codec.encode(values, room[start : start + count])
    assert (room[:start] == GUARD).all()
    assert (room[start + count :] == GUARD).all()
    return room[start : start + count].copy()


def decode(codec: Codec, data: Array, count: int) -> Array:
    """Decode between guard numbers, from read-only bytes at an odd address."""
    source = np.frombuffer(b"!" * 3 + data.tobytes(), np.uint8)[3:]
    room = np.full(count + 16, 123.5, np.float32)
    codec.decode(source, room[8 : 8 + count])
    assert (room[:8] == 123.5).all()
    assert (room[8 + count :] == 123.5).all()
    return room[8 : 8 + count]


KINDS = {
    "random": lambda rng, n: rng.standard_normal(n),
    "tiny": lambda rng, n: rng.standard_normal(n) * 1e-30,
    "edge_of_zero": lambda rng, n: rng.standard_normal(n) * np.exp2(rng.integers(-127, -110, n)),
    "denormal": lambda rng, n: rng.integers(-(2**23), 2**23, n) * 2.0**-149,
    "half_denormal": lambda rng, n: rng.standard_normal(n) * 2.0**-16,
    "huge": lambda rng, n: rng.uniform(-1, 1, n) * FLOAT32_TOP,
    "top": lambda rng, n: rng.choice([-1, 1, 1 - 2.0**-17], n) * FLOAT32_TOP,
    "mixed": lambda rng, n: rng.standard_normal(n) * np.exp2(rng.integers(-149, 120, n)),
    "constant": lambda rng, n: np.full(n, rng.standard_normal()),
    "zero": lambda rng, n: rng.choice([0.0, -0.0], n),
    "ties": lambda rng, n: rng.integers(-254, 255, n) / 2,
    "bits": lambda rng, n: rng.integers(0, 2**32, n, np.uint32).view(np.float32),
    "lost": lambda rng, n: np.where(rng.random(n) < 0.01, rng.choice([np.nan, np.inf, -np.inf], n), 1.0),
}


def draw(kind: str, count: int, seed: int) -> Array:
    with np.errstate(all="ignore"):
        made = KINDS[kind](np.random.default_rng(seed), count)
        return np.ascontiguousarray(made, np.float32)


VALUES = st.builds(draw, st.sampled_from(sorted(KINDS)), st.sampled_from(COUNTS), st.integers(0, 2**32 - 1))
BITS = st.lists(st.integers(0, 2**32 - 1), max_size=130).map(lambda bits: np.array(bits, np.uint32).view(np.float32))
NAMES = st.sampled_from(CODECS)


def check_codec(codec: Codec, values: Array) -> None:
    before = values.tobytes()
    data = encode(codec, values)
    decoded = decode(codec, data, values.size)
    assert values.tobytes() == before
    assert encode(codec, values.copy()).tobytes() == data.tobytes()
    with np.errstate(all="ignore"):
        error = np.abs(decoded.astype(np.float64) - values.astype(np.float64))
    bound = codec.error_bound(values)
    assert bound.dtype == np.float64
    promised = np.isfinite(bound)
    assert (error[promised] <= bound[promised]).all()
    lost = ~np.isfinite(values)
    assert not promised[lost].any()
    if codec.name == "topk":
        assert lost.any() == (~np.isfinite(decoded)).any()
    else:
        assert not np.isfinite(decoded[lost]).any()
    assert encode(codec, decoded.copy()).tobytes() == data.tobytes()


@given(NAMES, VALUES | BITS)
@settings(max_examples=300, deadline=None)
def test_bounds_hold_and_encoding_again_gives_the_same_bytes(name: str, values: Array) -> None:
    check_codec(make_codec(name), values)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("name", CODECS)
def test_every_kind_of_numbers(name: str, kind: str) -> None:
    for seed, count in enumerate(COUNTS):
        check_codec(make_codec(name), draw(kind, count, seed))


@pytest.mark.parametrize("name", CODECS)
def test_bounds_are_not_idle(name: str) -> None:
    values = draw("random", 10000, 1)
    codec = make_codec(name)
    error = np.abs(decode(codec, encode(codec, values), values.size).astype(np.float64) - values)
    assert (error / np.maximum(codec.error_bound(values), 1e-300)).max() > 0.95


@pytest.mark.parametrize(("name", "share"), [("int8", 1 / 253.9), ("int4", 1 / 13.8)])
def test_bound_is_a_share_of_the_largest_of_the_block(name: str, share: float) -> None:
    codec = make_codec(name)
    for seed in range(200):
        values = draw("random", codec.block_elements, seed)
        assert (codec.error_bound(values) < np.abs(values).max() * share).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("count", [limits.CODEC_PIECE_COUNT * 2 + extra for extra in (-1, 0, 1, 300)])
def test_pieces_fit_together(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = draw("mixed", count, count)
    codec = make_codec(name)
    whole = encode(codec, values)
    decoded = decode(codec, whole, count)
    monkeypatch.setattr(limits, "CODEC_PIECE_COUNT", 2**30)
    assert encode(codec, values).tobytes() == whole.tobytes()
    assert decode(codec, whole, count).tobytes() == decoded.tobytes()


@pytest.mark.parametrize("name", [name for name in CODECS if name != "topk"])
def test_ranges_that_begin_at_blocks_are_encoded_alike(name: str) -> None:
    codec = make_codec(name)
    values = draw("mixed", 1000, 5)
    cut = 2 * codec.block_elements
    whole = decode(codec, encode(codec, values), 1000)
    parts = [decode(codec, encode(codec, part.copy()), part.size) for part in (values[:cut], values[cut:])]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_float16_is_numpys() -> None:
    codec = make_codec("float16")
    edges = np.array([65519.99, 65520, 65536, 2.0**-25, 2.0**-25 * 1.0001, 3 * 2.0**-25, -0.0, np.inf], np.float32)
    for kind in ("random", "half_denormal", "huge", "mixed", "ties"):
        values = np.concatenate([edges, -edges, draw(kind, 10000, 2)])
        with np.errstate(over="ignore"):
            assert encode(codec, values).tobytes() == values.astype("<f2").tobytes()
    every = np.arange(2**16, dtype="<u2")
    numbers = every.view("<f2").astype(np.float32)
    decoded = decode(codec, every.view(np.uint8), every.size)
    assert np.array_equal(decoded, numbers, equal_nan=True)
    assert np.array_equal(np.signbit(decoded), np.signbit(numbers) & ~np.isnan(numbers))


def test_bfloat16_is_that_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codec = make_codec("bfloat16")
    bits = np.random.default_rng(3).integers(0, 2**32, 100_000, np.uint32)
    # What lies in the middle between two neighbours, too.
    bits[::2] = (bits[::2] & 0xFFFF0000) | 0x8000
    values = bits.view(np.float32)
    values = values[~np.isnan(values)].copy()
    data = encode(codec, values)
    assert data.tobytes() == values.astype(ml_dtypes.bfloat16).tobytes()
    decoded = decode(codec, data, values.size)
    assert decoded.tobytes() == data.view(ml_dtypes.bfloat16).astype(np.float32).tobytes()


def test_encoded_bytes_of_known_input() -> None:
    values = np.array([127, -2.5, 0, np.nan, 1.5, 3.5], np.float32)
    assert encode(make_codec("float16"), values).tobytes().hex(" ", 2) == "f057 00c1 0000 007e 003e 0043"
    assert encode(make_codec("bfloat16"), values).tobytes().hex(" ", 2) == "fe42 20c0 0000 c07f c03f 6040"
    assert encode(make_codec("int8"), values).tobytes().hex() == "0000c07f" + "00" * 6
    assert encode(make_codec("topk", fraction=1 / 3), values).tobytes().hex(" ", 4) == (
        "00000000 03000000 0000fe42 0000c07f"
    )
    values[3] = 7
    assert encode(make_codec("int8"), values).tobytes().hex() == "0000803f" + "7ffe00070204"
    assert encode(make_codec("int4"), values[1:].copy()).tobytes().hex() == "803f" + "0e2704"


@pytest.mark.parametrize("name", BLOCKWISE)
@pytest.mark.parametrize("lost", [np.nan, np.inf, -np.inf])
def test_only_the_block_of_a_lost_number_becomes_nan(name: str, lost: float) -> None:
    codec = make_codec(name)
    block = codec.block_elements
    values = draw("random", 3 * block + 5, 6)
    values[block + 3] = lost
    nan = np.isnan(decode(codec, encode(codec, values), values.size))
    assert nan[block : 2 * block].all()
    assert np.count_nonzero(nan) == block


def test_topk_takes_the_largest_and_of_equals_the_first() -> None:
    codec = make_codec("topk", fraction=0.5)
    values = np.array([1, -2, 2, np.nan, 0.5, -2, np.inf, 2], np.float32)
    assert decode(codec, encode(codec, values), 8).tolist()[:3] == [0, -2, 2]
    assert encode(codec, values)[:16].view("<u4").tolist() == [1, 2, 3, 6]
    count = 3 * limits.CODEC_PIECE_COUNT
    data = encode(make_codec("topk"), np.full(count, -1, np.float32))
    assert np.array_equal(data[: data.size // 2].view("<u4"), np.arange(count // 32))


@pytest.mark.parametrize(("count", "kept"), [(0, 0), (1, 1), (31, 1), (63, 1), (64, 2), (10000, 312)])
def test_topk_sends_its_fraction(count: int, kept: int) -> None:
    assert make_codec("topk").encoded_bytes(count) == 8 * kept


@given(NAMES, st.sampled_from(COUNTS), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_hostile_bytes_are_decoded_or_refused(name: str, count: int, seed: int) -> None:
    codec = make_codec(name)
    data = np.random.default_rng(seed).integers(0, 256, codec.encoded_bytes(count), np.uint8)
    try:
        decode(codec, data, count)
    except ProtocolError:
        assert name == "topk"


@pytest.mark.parametrize("indices", [[5, 5], [6, 5], [5, 100], [2**32 - 1, 0], [99, 2**32 - 1]])
def test_topk_refuses_wrong_indices_and_writes_nothing(indices: list[int]) -> None:
    data = np.array([*indices, 0, 0], "<u4").view(np.uint8)
    out = np.full(100, 7, np.float32)
    with pytest.raises(ProtocolError, match=r"topk \(fraction 0.02\)"):
        make_codec("topk", fraction=0.02).decode(data, out)
    assert (out == 7).all()


@pytest.mark.parametrize("name", CODECS)
def test_threads_share_a_codec(name: str) -> None:
    codec = make_codec(name)
    inputs = [draw(kind, 100_000, 8) for kind in ("random", "mixed", "half_denormal", "lost")]
    alone = [encode(codec, values).tobytes() for values in inputs]

    def work(index: int) -> bool:
        for _ in range(5):
            data = encode(codec, inputs[index])
            decode(codec, data, inputs[index].size)
            if data.tobytes() != alone[index]:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize("name", CODECS)
def test_codecs_are_values(name: str) -> None:
    codec = make_codec(name)
    assert codec == make_codec(name)
    assert hash(codec) == hash(make_codec(name))
    assert codec.name == name
    assert codec.describe().startswith(name)
    assert limits.CODEC_PIECE_COUNT % codec.block_elements == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("int3", {}, "codec 'int3' is not one of 'float16', 'bfloat16', 'int8', 'int4', 'topk'"),
        ("int8", {"fraction": 0.5}, "codec 'int8' has no option 'fraction' (given 0.5); it has none"),
        ("topk", {"k": 3}, "codec 'topk' has no option 'k' (given 3); it has only fraction"),
        ("topk", {"fraction": 0}, "fraction 0 is not a number above 0 and up to 1"),
        ("topk", {"fraction": 1.5}, "fraction 1.5 is not"),
        ("topk", {"fraction": float("nan")}, "fraction nan is not"),
        ("topk", {"fraction": "1/32"}, "fraction '1/32' is not"),
    ],
)
def test_unknown_codecs_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        make_codec(name, **options)


def test_wrong_arrays_are_refused() -> None:
    codec = make_codec("int8")
    values, data = np.zeros(10, np.float32), np.zeros(14, np.uint8)
    for wrong in (values.astype(np.float64), values.reshape(2, 5), np.zeros(20, np.float32)[::2], values.astype(">f4")):
        with pytest.raises(UsageError, match="values to encode must be float32, flat and contiguous, not"):
            codec.encode(wrong, data)
        with pytest.raises(UsageError, match="the array to decode into must be float32"):
            codec.decode(data, wrong)
    with pytest.raises(UsageError, match=r"10 elements are encoded by int8 .* in 14 bytes; .* has 13"):
        codec.encode(values, data[:13])
    with pytest.raises(UsageError, match="the array to encode into must be uint8"):
        codec.encode(values, data.view(np.int8))
    with pytest.raises(ProtocolError, match=r"10 elements are encoded by int8 .* in 14 bytes; 13 came"):
        codec.decode(data[:13], values)
    with pytest.raises(UsageError, match="too many for topk"):
        make_codec("topk").encoded_bytes(2**32 + 1)


def mean_decoded(codec: Codec, gradient: Array, steps: int, feedback: ErrorFeedback | None) -> Array:
    total = np.zeros(gradient.size)
    for _ in range(steps):
        sent = gradient.copy() if feedback is None else gradient + feedback.begin("g", gradient.size)
        decoded = decode(codec, encode(codec, sent), sent.size)
        if feedback is not None:
            feedback.commit("g", sent - decoded)
        total += decoded
    mean: Array = total / steps
    return mean


@pytest.mark.parametrize("name", ["int4", "topk"])
def test_feedback_makes_the_mean_converge(name: str) -> None:
    codec, steps = make_codec(name), 200
    gradient = draw("random", 1000, 9)
    feedback = ErrorFeedback()
    early = np.abs(mean_decoded(codec, gradient, steps // 4, ErrorFeedback()) - gradient)
    late = np.abs(mean_decoded(codec, gradient, steps, feedback) - gradient)
    # What is missing of the sum is the residual, which does not grow with the number of steps.
    residual = np.abs(feedback.begin("g", 1000))
    assert np.allclose(late * steps, residual, atol=steps * 1e-5)
    assert late.mean() < early.mean() / 2.5
    without = np.abs(mean_decoded(codec, gradient, steps, None) - gradient)
    assert late.mean() < without.mean() / (50 if name == "int4" else 4)


def test_feedback_keeps_residuals_by_key() -> None:
    feedback = ErrorFeedback()
    zeros = feedback.begin("a", 3)
    assert zeros.dtype == np.float32
    assert zeros.tolist() == [0, 0, 0]
    # Nothing was committed: the call may have been of another count.
    assert feedback.begin("a", 4).size == 4
    residual = np.array([1, np.nan, -np.inf], np.float32)
    feedback.commit("a", residual)
    shown = feedback.begin("a", 3)
    assert shown.tolist() == [1, 0, 0]
    assert np.shares_memory(shown, residual)
    with pytest.raises(ValueError, match="read-only"):
        shown[0] = 2
    feedback.commit(("b", 1), np.ones(5, np.float32))
    assert feedback.nbytes == 32
    feedback.clear()
    assert feedback.nbytes == 0
    assert feedback.begin("a", 4).tolist() == [0] * 4


def test_feedback_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FEEDBACK_KEYS_MAX_COUNT", 2)
    feedback = ErrorFeedback()
    feedback.commit("a", np.zeros(3, np.float32))
    for call in (lambda: feedback.begin("a", 4), lambda: feedback.commit("a", np.zeros(4, np.float32))):
        with pytest.raises(UsageError, match="the residual of 'a' has 3 elements, not 4"):
            call()
    for wrong in (np.zeros(3), np.zeros((3, 1), np.float32), np.zeros(6, np.float32)[::2], feedback.begin("a", 3)):
        with pytest.raises(UsageError, match="the residual of 'a' must be float32, flat, contiguous and writable"):
            feedback.commit("a", wrong)
    feedback.commit("b", np.zeros(1, np.float32))
    for call in (lambda: feedback.begin("c", 3), lambda: feedback.commit("c", np.zeros(3, np.float32))):
        with pytest.raises(UsageError, match="no residual can be kept for 'c': there are 2 already"):
            call()
    assert feedback.begin("b", 1).size == 1
