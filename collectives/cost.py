"""What an algorithm costs, and which one to take.

The model is that of LogGP: a message takes its sender and its receiver some time each, is on its way for the latency,
and its bytes take turns on the sender's line and at the processors. What several ranks of one host do at a time shares
its processors. The segments of one stream overlap along its path. All that goes in is the same on every rank, so that
every rank reaches the same plan without asking.

Source: A. Alexandrov, M. Ionescu, K. Schauser, C. Scheiman, "LogGP: incorporating long messages into the LogP model",
SPAA 1995; R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH", Int. J.
High Perform. Comput. Appl. 19 (2005), sections 3 and 4; for trees, Sanders, Speck and Träff (2009).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2, sqrt

from sparkle_mesh import limits
from sparkle_mesh.collectives.topology import Topology
from sparkle_mesh.collectives.traffic import crossings
from sparkle_mesh.collectives.tree import tree_height
from sparkle_mesh.errors import UsageError


@dataclass(frozen=True, slots=True)
class Processor:
    """What this project's own work costs a processor.

    The figures are the least squares (of logarithms) of what ``benchmarks/all_reduce.py --algorithms all`` measured on
    a machine of two cores; elsewhere they say which algorithm is faster rather than how fast it is.

    Attributes
    ----------
    call_s
        Seconds per operation, whatever it is.
    peer_s
        Seconds per operation and other rank, to agree on its begin and its end.
    message_s, small_message_s
        Seconds per message, for sender and receiver together; the second where all is sent at once with the begin.
    byte_s
        Seconds per byte that is sent, received and ciphered.
    reduce_byte_s
        Seconds per byte that is added up.
    hop_s
        Seconds until a message that has come lets the next one go.
    shared_call_s, shared_byte_s
        Seconds per call and per byte in shared memory.
    cores
        How many of a host's ranks can work at a time.
    """

    call_s: float = 10e-6
    peer_s: float = 370e-6
    message_s: float = 70e-6
    small_message_s: float = 26e-6
    byte_s: float = 0.48e-9
    reduce_byte_s: float = 0.1e-9
    hop_s: float = 43e-6
    shared_call_s: float = 150e-6
    shared_byte_s: float = 0.28e-9
    cores: int = 2


PROCESSOR = Processor()
# Four hosts at 1 Gbit/s, 64 MiB: the ring takes 92% of the wire, the butterfly 86%.
_CROSSING_RATIO = 1.05
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


@dataclass(frozen=True, slots=True)
class Work:
    """What an algorithm makes ranks do.

    Attributes
    ----------
    hops
        How many messages follow upon each other, from the first to the last.
    first_bytes
        What goes over each hop before the next one can begin.
    messages
        That the busiest rank sends or receives, whichever are more.
    rank_bytes
        That each rank sends, or receives if that is more.
    reduced_bytes
        That the busiest rank adds up.
    local_hops
        How many of the hops stay within a host.
    crossing
        Whether several send to one at the same time, so that queues overflow now and then.
    """

    hops: float
    first_bytes: float
    messages: float
    rank_bytes: tuple[float, ...]
    reduced_bytes: float = 0.0
    local_hops: float = 0.0
    crossing: bool = False


def _even(size: int, nbytes: float) -> tuple[float, ...]:
    return (nbytes,) * size


def ring_work(nbytes: int, topology: Topology) -> Work:
    """A ring sends ``2 (size - 1)`` shards, one after the other."""
    size = topology.size
    shard = nbytes / size
    segment = min(segment_bytes(nbytes, size), shard)
    rounds = 2 * (size - 1)
    messages = rounds * max(ceil(shard / max(segment, 1)), 1)
    return Work(rounds, segment, messages, _even(size, rounds * shard), rounds / 2 * shard)


def tree_work(nbytes: int, topology: Topology) -> Work:
    """A double binary tree goes up and down again, inner ranks sending ``2 * nbytes``."""
    size = topology.size
    segment = min(segment_bytes(nbytes, 2), nbytes / 2)
    messages = 4 * max(ceil(nbytes / 2 / max(segment, 1)), 1)
    rank_bytes = _even(size, 2.0 * nbytes if size > 2 else nbytes)
    return Work(2 * tree_height(size), segment, messages, rank_bytes, nbytes if size > 2 else nbytes / 2)


def direct_work(nbytes: int, topology: Topology) -> Work:
    """Every rank sends everything to every other: one hop, ``(size - 1) * nbytes``."""
    others = topology.size - 1
    segment = min(segment_bytes(nbytes, 1), nbytes)
    messages = others * max(ceil(nbytes / max(segment, 1)), 1)
    return Work(1, segment, messages, _even(others + 1, others * nbytes), others * nbytes)


def halving_doubling_work(nbytes: int, topology: Topology) -> Work:
    """Halving and doubling send what a ring does in ``2 log2(size)`` exchanges; folding adds two whole vectors."""
    size = topology.size
    participants = 1 << (size.bit_length() - 1)
    exchanges = 2 * log2(participants)
    folds = 2 if size > participants else 0
    rank_bytes = (2 * (participants - 1) / participants + folds / 2) * nbytes
    sizes = [nbytes / 2 ** (turn + 1) for turn in range(int(exchanges / 2))] * 2 + [nbytes] * folds
    segment = segment_bytes(nbytes, 1)
    messages = sum(max(ceil(size_ / segment), 1) for size_ in sizes)
    # Each exchange is done before the next begins.
    first_bytes = rank_bytes / (exchanges + folds)
    return Work(exchanges + folds, first_bytes, messages, _even(size, rank_bytes), rank_bytes / 2)


def butterfly_work(nbytes: int, topology: Topology) -> Work:
    """Shards go to their owners and back: ``1 + (size - 2) * share`` vectors per rank, two hops."""
    size = topology.size
    shares = topology.shares
    segment = butterfly_segment(nbytes, topology)
    most = max(shares)
    messages = 2 * (size - 1) * max(ceil(most * nbytes / segment), 1)
    rank_bytes = tuple((1 + (size - 2) * share) * nbytes for share in shares)
    reduced_bytes = (size - 1) * most * nbytes
    return Work(2, min(segment, most * nbytes), messages, rank_bytes, reduced_bytes, crossing=True)


def butterfly_segment(nbytes: int, topology: Topology) -> int:
    """Return the bytes of a segment of the butterfly.

    What comes last of a slow line goes back over it once more, a segment from each owner: that time and the messages'
    own are least together for ``sqrt(nbytes * message * line / owners)``.
    """
    if not topology.is_uneven:
        return segment_bytes(ceil(nbytes / topology.size), 1)
    line = min(topology.lines)
    best = sqrt(nbytes * PROCESSOR.message_s * line / max(topology.size - 1, 1))
    wanted = ceil(min(best, limits.COLLECTIVE_SEGMENT_BYTES) / _ALIGN_BYTES) * _ALIGN_BYTES
    return max(wanted, limits.COLLECTIVE_SEGMENT_SLOW_MIN_BYTES)


def hierarchical_work(nbytes: int, topology: Topology) -> Work:
    """Ranks of a host give all to one, which exchanges it with other hosts and gives it back."""
    hosts = Counter(topology.host_of)
    most = max(hosts.values())
    count = len(hosts)
    segment = min(segment_bytes(nbytes, count), nbytes / count)
    messages = (2 * (most - 1) + 2 * (count - 1) / count) * max(ceil(nbytes / max(segment, 1)), 1)
    rank_bytes = (most - 1 + 2 * (count - 1) / count) * nbytes
    reduced_bytes = (most - 1 + (count - 1) / count) * nbytes
    hops, local_hops = (4, 2) if count > 1 else (2, 2)
    return Work(hops, segment, messages, _even(topology.size, rank_bytes), reduced_bytes, local_hops)


def chain_work(nbytes: int, topology: Topology) -> Work:
    """To or from one rank along a chain."""
    segment = min(segment_bytes(nbytes, 1), nbytes)
    return Work(topology.size - 1, segment, max(ceil(nbytes / max(segment, 1)), 1), _even(topology.size, nbytes))


def binary_tree_work(nbytes: int, topology: Topology) -> Work:
    """To or from one rank through a binary tree, whose inner ranks send, or receive, everything twice."""
    size = topology.size
    twice = 2 if size > 2 else 1
    segment = min(segment_bytes(nbytes, 1), nbytes)
    messages = twice * max(ceil(nbytes / max(segment, 1)), 1)
    return Work(max(size.bit_length() - 1, 1), segment, messages, _even(size, twice * nbytes))


def turns_at_processors(topology: Topology, processor: Processor = PROCESSOR) -> float:
    """Return how many times longer processing takes because the ranks of a host share its processors."""
    return max(max(Counter(topology.host_of).values()) / processor.cores, 1.0)


def predict_s(
    work: Work,
    nbytes: int,
    topology: Topology,
    processor: Processor = PROCESSOR,
    line_bytes: Sequence[float] | None = None,
) -> float:
    """Return the seconds that ``work`` for an array of ``nbytes`` takes, from the call to its return.

    ``line_bytes`` are what the line of each rank's host carries, if they are known; else as many as the rank sends.
    """
    turns, latency_s = turns_at_processors(topology, processor), topology.worst_latency_s
    at_once = nbytes <= limits.COLLECTIVE_EAGER_MAX_BYTES
    message_s = processor.small_message_s if at_once else processor.message_s
    bytes_s = max(work.rank_bytes) * processor.byte_s + work.reduced_bytes * processor.reduce_byte_s
    processing_s = turns * (work.messages * message_s + bytes_s)
    # A line as fast as processors is none to wait for.
    # (Uneven ones are paced.)
    loss = _CROSSING_RATIO if work.crossing and not topology.is_uneven else 1.0
    line_s = [
        loss * sent / line if line < limits.TOPOLOGY_LINE_MAX_BYTES_PER_S else 0.0
        for sent, line in zip(work.rank_bytes if line_bytes is None else line_bytes, topology.lines, strict=True)
    ]
    # What one hop takes is hidden behind what else there is to send, as far as there is.
    hop_s = latency_s + (work.first_bytes / min(topology.lines) if max(line_s) else 0.0)
    network_s = max(max(line_s) + latency_s, (work.hops - work.local_hops) * hop_s)
    # To agree on the end; and before, where not all is sent at once, on the begin.
    agreeing_s = (1 if at_once else 2) * latency_s + turns * (topology.size - 1) * processor.peer_s
    return processor.call_s + agreeing_s + work.hops * processor.hop_s + max(network_s, processing_s)


def shared_s(nbytes: int, topology: Topology, processor: Processor = PROCESSOR) -> float:
    """Return the seconds that a one-sided all-reduce in shared memory takes: processors only."""
    return turns_at_processors(topology, processor) * (processor.shared_call_s + nbytes * processor.shared_byte_s)


Model = Callable[[int, Topology], Work]
_ALL_REDUCE: dict[str, Model] = {
    "ring": ring_work,
    "tree": tree_work,
    "direct": direct_work,
    "halving_doubling": halving_doubling_work,
    "butterfly": butterfly_work,
    "hierarchical": hierarchical_work,
}
_BROADCAST: dict[str, Model] = {"chain": chain_work, "binary_tree": binary_tree_work}
MODELS: dict[str, dict[str, Model]] = {"all_reduce": _ALL_REDUCE, "broadcast": _BROADCAST, "reduce": _BROADCAST}
ALL_REDUCE_ALGORITHMS = tuple(_ALL_REDUCE)


def predictions(nbytes: int, topology: Topology, kind: str = "all_reduce") -> dict[str, float]:
    """Return the seconds that each algorithm for ``kind`` is predicted to take, the shortest first.

    Only those that may be chosen: without several ranks on one of several hosts there is no hierarchy.
    """
    if topology.size == 1:
        return dict.fromkeys(MODELS[kind], 0.0)
    found: dict[str, float] = {}
    for name, model in MODELS[kind].items():
        carried = crossings(name, topology) if kind == "all_reduce" else None
        line_bytes = None if carried is None else [part * nbytes for part in carried]
        found[name] = predict_s(model(nbytes, topology), nbytes, topology, line_bytes=line_bytes)
    if not 1 < topology.host_count < topology.size:
        found.pop("hierarchical", None)
    return dict(sorted(found.items(), key=lambda item: item[1]))


@lru_cache(maxsize=limits.COLLECTIVE_PLANS_CACHED_MAX_COUNT)
def _fastest(nbytes: int, topology: Topology, kind: str) -> str:
    return next(iter(predictions(nbytes, topology, kind)))


def choose_algorithm(nbytes: int, topology: Topology, *, kind: str = "all_reduce", asked: str = "auto") -> str:
    """Return the name of the algorithm to use: the one asked for, or the one predicted to be fastest.

    Raises
    ------
    UsageError
        If ``asked`` is not the name of an algorithm for ``kind``.
    """
    if not isinstance(asked, str):
        raise UsageError(f"algorithm is {asked!r}, not a name")
    if asked == "auto":
        return _fastest(nbytes, topology, kind)
    if asked not in MODELS[kind]:
        shared = ("shared",) if kind == "all_reduce" else ()
        known = ", ".join(repr(name) for name in ("auto", *MODELS[kind], *shared))
        raise UsageError(f"algorithm {asked!r} is not one of {known}")
    return asked
