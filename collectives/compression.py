"""What a caller may ask for as ``compression``, and what ``"auto"`` makes of it.

Compressed arrays go by the butterfly: every number is encoded where it starts, added up in float32, and encoded once
more where it is complete, so that a loss is taken twice whatever the number of ranks.
"""

from __future__ import annotations

from typing import Any, Final

from sparkle_mesh import limits
from sparkle_mesh.collectives.arrays import Arrays
from sparkle_mesh.collectives.codec import Codec
from sparkle_mesh.collectives.codecs import CODECS, make_codec
from sparkle_mesh.collectives.cost import butterfly_work, predict_s, predictions
from sparkle_mesh.collectives.feedback import ErrorFeedback
from sparkle_mesh.collectives.reduction import FLOAT32, is_half
from sparkle_mesh.collectives.topology import Topology
from sparkle_mesh.errors import UsageError

#: Seconds per byte of float32 to encode and to decode, measured; of those that "auto" chooses from.
_CODEC_S_PER_BYTE: Final = {"bfloat16": (0.35e-9, 0.2e-9), "int8": (0.4e-9, 0.25e-9)}
#: What "auto" must gain to take a loss for it.
_WORTH_A_LOSS_RATIO: Final = 1.25
_FEEDBACK_OPS: Final = ("sum", "mean")


class Compression:
    """A way to send numbers in fewer bytes: ``"float16"``, ``"bfloat16"``, ``"int8"``, ``"int4"`` or ``"topk"``.

    Parameters
    ----------
    codec
        Its name. Their errors are bounded, see :mod:`sparkle_mesh.collectives.codecs`.
    error_feedback
        Keep what was lost, and add it to the arrays of the next call (with ``"topk"`` this is what makes training
        converge). An object then goes with one set of arrays: use it in every step for the same ones, and for no
        others. It holds as many float32 as they do.
    options
        Of the codec: ``fraction`` for ``"topk"``.

    Raises
    ------
    UsageError
        If there is no such codec, or it has no such option.

    Examples
    --------
    >>> from sparkle_mesh import Compression
    >>> Compression("topk", error_feedback=True, fraction=1 / 64)
    Compression(top-k of 0.015625, error feedback)
    """

    def __init__(self, codec: str, *, error_feedback: bool = False, **options: Any) -> None:
        self.codec: Codec = make_codec(codec, **options)
        self.feedback = ErrorFeedback() if error_feedback else None

    def __repr__(self) -> str:
        return f"Compression({self.describe()})"

    def describe(self) -> str:
        """Return one line for people, the same on all ranks that ask for the same."""
        return self.codec.describe() + (", error feedback" if self.feedback is not None else "")


def check_compression(
    asked: object, arrays: Arrays, op: str, algorithm: object, topology: Topology, beside: int = 0
) -> Compression | None:
    """Return how ``arrays`` are to be sent, None if as they are; the last ``beside`` of them are in any case.

    Raises
    ------
    UsageError
        If ``asked`` is no way to do so, or these arrays, this op or this algorithm cannot be combined with it.
    """
    if asked is None:
        return None
    if asked == "auto":
        return _choose(arrays, op, algorithm, topology, beside)
    if isinstance(asked, str):
        asked = Compression(asked)
    if not isinstance(asked, Compression):
        known = ", ".join(map(repr, ("auto", *CODECS)))
        raise UsageError(f"compression is {asked!r}; give one of {known}, a sparkle_mesh.Compression, or None")
    for item in arrays.named[: len(arrays.values) - beside]:
        check_compressible(item.array.dtype, item.label)
    if algorithm not in ("auto", "butterfly"):
        raise UsageError(f"algorithm {algorithm!r} does not go with compression, only 'butterfly' (or 'auto') does")
    if asked.feedback is not None and op not in _FEEDBACK_OPS:
        raise UsageError(f"op {op!r} does not go with error feedback: what was lost can only be added to a sum or mean")
    return asked


def check_compressible(dtype: Any, label: str) -> None:
    """Raises UsageError if arrays of ``dtype`` cannot be sent in fewer bytes."""
    if not can_be_compressed(dtype):
        raise UsageError(
            f"{label} is of dtype {dtype}; float32, float16 and bfloat16 can be compressed: reduce others in a call of"
            " their own"
        )


def can_be_compressed(dtype: Any) -> bool:
    """Whether arrays of ``dtype`` can be sent in fewer bytes."""
    return bool(dtype == FLOAT32 or is_half(dtype))


def _choose(arrays: Arrays, op: str, algorithm: object, topology: Topology, beside: int) -> Compression | None:
    """Weigh the time that encoding and decoding take against what it saves on the slowest line."""
    if algorithm not in ("auto", "butterfly") or topology.size == 1 or not arrays.values:
        return None
    if min(topology.lines) >= limits.TOPOLOGY_LINE_MAX_BYTES_PER_S:
        return None
    if not all(array.dtype == FLOAT32 for array in arrays.values[: len(arrays.values) - beside]):
        return None
    nbytes = arrays.nbytes
    best, least_s = None, next(iter(predictions(nbytes, topology).values())) / _WORTH_A_LOSS_RATIO
    for name, (encode_s, decode_s) in _CODEC_S_PER_BYTE.items():
        ratio = make_codec(name).encoded_bytes(nbytes // 4) / nbytes if nbytes else 1.0
        # All of the input is encoded, and a shard once more; what comes is decoded, as much as goes.
        seconds = predict_s(butterfly_work(int(nbytes * ratio), topology), nbytes, topology) + 2 * nbytes * (
            encode_s + decode_s
        )
        if seconds < least_s:
            best, least_s = name, seconds
    return Compression(best) if best is not None else None
