"""Error feedback: what a codec dropped in one call is added to what the next call sends.

Sources: F. Seide et al., "1-bit stochastic gradient descent and its application to data-parallel distributed training
of speech DNNs", Interspeech 2014, section 2; S. P. Karimireddy et al., "Error feedback fixes SignSGD and other gradient
compression schemes", ICML 2019, algorithm 1. So the sum of what was sent differs from the sum of what was to be sent by
one residual only, however many calls there were.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.collectives.codec import pieces
from sparkle_mesh.collectives.reduction import FLOAT32, Array
from sparkle_mesh.errors import UsageError


class ErrorFeedback:
    """Residuals kept between calls, by key, such as the name of a gradient.

    A call begins with the committed residual, adds it to its input, encodes the sum, and once all ranks have the result
    commits the sum less what was decoded. A call that fails commits nothing, so that it can be made again. Not for
    several threads at once.
    """

    __slots__ = ("_residuals",)

    def __init__(self) -> None:
        self._residuals: dict[Hashable, Array] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of all residuals."""
        return sum(residual.nbytes for residual in self._residuals.values())

    def begin(self, key: Hashable, count: int) -> Array:
        """Return the committed residual of ``key``: float32, shape ``(count,)``, read-only; zeros if there is none.

        It is not a copy: it is for use until the next commit or clear.

        Raises
        ------
        UsageError
            ``key`` was used with another count, or would be one key too many.
        """
        residual = self._residuals.get(key)
        if residual is None:
            self._check_room(key)
            residual = np.zeros(count, np.float32)
        elif residual.size != count:
            raise UsageError(_changed(key, residual.size, count))
        shown = residual.view()
        shown.flags.writeable = False
        return shown

    def commit(self, key: Hashable, new_residual: Array) -> None:
        """Take ``new_residual`` over as the residual of ``key``: the caller must not write to it any more.

        NaN and infinity in it are set to zero: every rank has seen them in the result, and they would come back in
        every later call.

        Parameters
        ----------
        key
            As in :meth:`begin`.
        new_residual
            float32, shape ``(count,)``, contiguous, writable.

        Raises
        ------
        UsageError
            It is another kind of array or of another count than the last one of ``key``, or one key too many.
        """
        flags = new_residual.flags
        if new_residual.dtype != FLOAT32 or new_residual.ndim != 1 or not flags.c_contiguous or not flags.writeable:
            raise UsageError(
                f"the residual of {key!r} must be float32, flat, contiguous and writable, not {new_residual.dtype} of"
                f" shape {new_residual.shape}{'' if flags.writeable else ', read-only'}"
            )
        old = self._residuals.get(key)
        if old is None:
            self._check_room(key)
        elif old.size != new_residual.size:
            raise UsageError(_changed(key, old.size, new_residual.size))
        for piece in pieces(new_residual.size):
            finite = np.isfinite(new_residual[piece])
            if not finite.all():
                new_residual[piece][~finite] = 0
        self._residuals[key] = new_residual

    def clear(self) -> None:
        """Forget all residuals, for example when the parameters were loaded anew."""
        self._residuals.clear()

    def _check_room(self, key: Hashable) -> None:
        if len(self._residuals) >= limits.FEEDBACK_KEYS_MAX_COUNT:
            raise UsageError(
                f"no residual can be kept for {key!r}: there are {len(self._residuals)} already, the most that is"
                " allowed; use the same keys in every step, or clear()"
            )


def _changed(key: Hashable, old: int, new: int) -> str:
    return f"the residual of {key!r} has {old} elements, not {new}; use another key for another array, or clear()"
