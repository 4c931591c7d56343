"""What all ranks must have in common when they make one call."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from sparkle_mesh import limits
from sparkle_mesh.collectives.arrays import ArraysLook
from sparkle_mesh.collectives.messages import call_digest

#: The algorithm that is done one-sided or not at all.
SHARED = "shared"


class CallIdentity(NamedTuple):
    """Equal calls have equal digests; the description is for people, of bounded length."""

    digest: bytes
    description: str


@lru_cache(maxsize=limits.COLLECTIVE_PLANS_CACHED_MAX_COUNT)
def call_identity(
    kind: str,
    algorithm: str,
    one_sided: bool,
    op: str,
    root: int | None,
    look: ArraysLook,
    compression: str = "",
    target: int | None = None,
    terms: str = "",
) -> CallIdentity:
    """Return the identity of a call over arrays of one look; ``send`` and its ``receive`` are the same call."""
    # Training repeats the same few calls over and over.
    match kind:
        case "all_reduce":
            shown = "auto" if one_sided and algorithm != SHARED else algorithm
            text = f"all_reduce({look.describe()}, op={op!r}, algorithm={shown!r})"
            text = text if not compression else f"{text[:-1]}, compression={compression!r})"
            text = text if not terms else f"{text[:-1]}, {terms})"
        case "broadcast":
            text = f"broadcast({look.describe()}, root={root})"
        case "send":
            text = f"send({look.describe()}, to={target})"
        case "receive":
            text = f"receive({look.describe()}, source={root})"
        case "barrier":
            text = "barrier()"
        case _:
            arguments = [look.describe()]
            arguments += [f"op={op!r}"] if kind in ("reduce", "reduce_scatter") else []
            arguments += [f"root={root}"] if root is not None else []
            text = f"{kind}({', '.join(arguments)})"
    limit = limits.COLLECTIVE_DESCRIPTION_MAX_CHARS
    what = kind if target is None else f"to {target}"
    digest = call_digest((1, what, algorithm, one_sided, op, root, compression, terms, look.signature()))
    return CallIdentity(digest, text if len(text) <= limit else text[: limit - 1] + "…")
