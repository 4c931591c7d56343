"""The codecs by name: ways to send float32 numbers in fewer bytes.

=========  ================  ======================================================
name       bytes per number  largest error
=========  ================  ======================================================
float16    2                 2**-11 of the number; 65520 and more become infinity
bfloat16   2                 2**-8 of the number
int8       1.016             1/253.9 of the largest of 256 numbers
int4       0.531             1/13.8 of the largest of 64 numbers
topk       0.25              the number itself, unless among the largest 1 in 32
=========  ================  ======================================================
"""

from __future__ import annotations

from typing import Any, Final

from sparkle_mesh.collectives.blockwise import Int4, Int8
from sparkle_mesh.collectives.casts import BFloat16, Float16
from sparkle_mesh.collectives.codec import Codec
from sparkle_mesh.collectives.topk import TopK
from sparkle_mesh.errors import UsageError

_CODECS: Final[dict[str, type[Codec]]] = {codec.name: codec for codec in (Float16, BFloat16, Int8, Int4, TopK)}
_OPTIONS: Final[dict[str, tuple[str, ...]]] = {TopK.name: ("fraction",)}
CODECS: Final = tuple(_CODECS)


def make_codec(name: str, **options: Any) -> Codec:
    """Return the codec called ``name``. Only "topk" has an option, ``fraction`` (default 1/32).

    Raises
    ------
    UsageError
        There is no such codec, it has no such option, or not with this value.
    """
    if name not in _CODECS:
        raise UsageError(f"codec {name!r} is not one of {', '.join(map(repr, CODECS))}")
    allowed = _OPTIONS.get(name, ())
    for option, value in options.items():
        if option not in allowed:
            has = f"only {', '.join(allowed)}" if allowed else "none"
            raise UsageError(f"codec {name!r} has no option {option!r} (given {value!r}); it has {has}")
    return _CODECS[name](**options)
