"""What an algorithm costs, and which one to take.

The model is Hockney's: a message of ``m`` bytes takes ``alpha + m * beta`` seconds, with the segments of one
message stream overlapping along its path. All that goes in is the same on every rank, so that every rank
reaches the same plan without asking.

Source: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH",
Int. J. High Perform. Comput. Appl. 19 (2005), sections 3 and 4; for trees, Sanders, Speck and Träff (2009).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from sparkle_mesh import limits
from sparkle_mesh.collectives.tree import tree_height
from sparkle_mesh.errors import UsageError


@dataclass(frozen=True, slots=True)
class LinkCost:
    """What all links of a view are taken to cost.

    Attributes
    ----------
    alpha_s
        Seconds per message, whatever its size.
    beta_s_per_byte
        Seconds per byte.
    """

    alpha_s: float = 100e-6
    beta_s_per_byte: float = 1e-9


DEFAULT_LINK_COST = LinkCost()
_SEGMENTS_PER_STREAM = 4
_ALIGN_BYTES = 64


def segment_bytes(nbytes: int, parts: int) -> int:
    """Return the bytes of one segment where ``nbytes`` are cut into ``parts`` streams.

    At least a few segments per stream, so that steps overlap; but none so small that messages cost more than
    bytes; and all of a stream about equal.
    """
    stream = nbytes / max(parts, 1)
    count = max(ceil(stream / limits.COLLECTIVE_SEGMENT_BYTES), _SEGMENTS_PER_STREAM)
    wanted = ceil(stream / count / _ALIGN_BYTES) * _ALIGN_BYTES
    return min(max(wanted, limits.COLLECTIVE_SEGMENT_MIN_BYTES), limits.COLLECTIVE_SEGMENT_BYTES)


def _stream_s(nbytes: float, hops: int, segment: int, fan: float, cost: LinkCost) -> float:
    """Return the seconds of a pipelined stream over ``hops`` in which every rank sends ``fan`` times ``nbytes``."""
    if not nbytes:
        return hops * cost.alpha_s
    messages = ceil(nbytes / segment)
    one = cost.alpha_s + min(nbytes, segment) * cost.beta_s_per_byte
    # The first message's latency is paid once per hop; after it, only what a rank has to send counts.
    return (hops - 1) * one + cost.alpha_s + fan * ((messages - 1) * cost.alpha_s + nbytes * cost.beta_s_per_byte)


def ring_s(nbytes: int, size: int, cost: LinkCost = DEFAULT_LINK_COST) -> float:
    """Predict a ring all-reduce: ``2 (size - 1)`` rounds of one shard each. Sends ``2 (size-1)/size * nbytes``."""
    rounds = 2 * (size - 1)
    return rounds * _stream_s(nbytes / max(size, 1), 1, segment_bytes(nbytes, size), 1.0, cost)


def tree_s(nbytes: int, size: int, cost: LinkCost = DEFAULT_LINK_COST) -> float:
    """Predict a double binary tree: up and down again, inner ranks sending ``2 * nbytes``."""
    return _stream_s(nbytes / 2, 2 * tree_height(size), segment_bytes(nbytes, 2), 4.0 if size > 2 else 2.0, cost)


def direct_s(nbytes: int, size: int, cost: LinkCost = DEFAULT_LINK_COST) -> float:
    """Predict that every rank sends everything to every other: one hop, ``(size - 1) * nbytes``."""
    # Messages that go and come side by side keep a rank busy for about a quarter of what one takes to arrive.
    messages_s = (size - 1) * cost.alpha_s / 4
    return messages_s + _stream_s(nbytes, 1, segment_bytes(nbytes, 1), size - 1.0, cost)


def chain_s(nbytes: int, size: int, cost: LinkCost = DEFAULT_LINK_COST) -> float:
    """Predict a broadcast along a chain."""
    return _stream_s(nbytes, size - 1, segment_bytes(nbytes, 1), 1.0, cost)


def binary_tree_s(nbytes: int, size: int, cost: LinkCost = DEFAULT_LINK_COST) -> float:
    """Predict a broadcast down a binary tree, whose inner ranks send everything twice."""
    return _stream_s(nbytes, max(size.bit_length() - 1, 1), segment_bytes(nbytes, 1), 2.0 if size > 2 else 1.0, cost)


_ALL_REDUCE: dict[str, Callable[[int, int, LinkCost], float]] = {
    "ring": ring_s,
    "tree": tree_s,
    "direct": direct_s,
}
_BROADCAST: dict[str, Callable[[int, int, LinkCost], float]] = {"chain": chain_s, "binary_tree": binary_tree_s}
ALL_REDUCE_ALGORITHMS = tuple(_ALL_REDUCE)


@lru_cache(maxsize=limits.COLLECTIVE_PLANS_CACHED_MAX_COUNT)
def choose_algorithm(
    nbytes: int, size: int, *, kind: str = "all_reduce", asked: str = "auto", cost: LinkCost = DEFAULT_LINK_COST
) -> str:
    """Return the name of the algorithm to use: the one asked for, or the one predicted to be fastest.

    Raises
    ------
    UsageError
        If ``asked`` is not the name of an algorithm for ``kind``.
    """
    table = _ALL_REDUCE if kind == "all_reduce" else _BROADCAST
    if asked != "auto":
        if asked not in table:
            known = ", ".join(repr(name) for name in ("auto", *table, *(("shared",) if kind == "all_reduce" else ())))
            raise UsageError(f"algorithm {asked!r} is not one of {known}")
        return asked
    # What is not sent at once waits for every peer to have begun: that is a hop more, and what "direct" saves.
    fitting = [name for name in table if name != "direct" or nbytes <= limits.COLLECTIVE_EAGER_MAX_BYTES]
    return min(fitting, key=lambda name: table[name](nbytes, size, cost))
