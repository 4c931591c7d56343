"""Hierarchical all-reduce: inside each host first, then among hosts, so that a host's line carries a vector once.

The lowest rank of a host leads it. The others give it their vectors, which it adds up in the order of the ranks;
leaders exchange what they have by the butterfly (:mod:`.butterfly`), and pass the result on to their hosts' ranks.
Segments flow through all of it. Between hosts ``2 (hosts - 1) / hosts`` of the vector goes per host, however
many ranks it has.

Source: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH",
Int. J. High Perform. Comput. Appl. 19 (2005), section 6 (as future work); P. Sanders, J. L. Träff, "The
hierarchical factor algorithm for all-to-all communication", Euro-Par 2002, section 2, for the two levels.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparkle_mesh.collectives.butterfly import Cut
from sparkle_mesh.collectives.schedule import (
    Content,
    Receive,
    Reduce,
    Schedule,
    Send,
    Space,
    Step,
    segments,
    split_evenly,
)

_UP, _SCATTER, _GATHER, _DOWN = range(4)


def hierarchical_all_reduce(
    rank: int, size: int, element_count: int, segment_elements: int, hosts: tuple[int, ...] | None = None
) -> Schedule:
    """Return ``rank``'s part. All arguments but ``rank`` must be the same on every rank.

    ``hosts`` gives each rank's host as any number; all ranks are on one host if None.
    """
    name = "hierarchical"
    if size == 1:
        return Schedule(name, rank, size, element_count, (), Space.INPUT)
    hosts = hosts or (0,) * size
    ranks_of: dict[int, list[int]] = {}
    for other, host in enumerate(hosts):
        ranks_of.setdefault(host, []).append(other)
    leaders = sorted(ranks[0] for ranks in ranks_of.values())
    leader, *members = ranks_of[hosts[rank]]
    shards = split_evenly(element_count, len(leaders))
    cuts = {lead: list(segments(*shard, segment_elements)) for lead, shard in zip(leaders, shards, strict=True)}
    whole = _in_turn(list(cuts.values()))
    steps: list[Step] = []
    if rank != leader:
        steps += [Send(leader, low, high, Space.INPUT, _UP, n, Content.INPUT) for n, low, high in whole]
        steps += [Receive(leader, low, high, Space.WORK, _DOWN, n, Content.RESULT) for n, low, high in whole]
        return Schedule(name, rank, size, element_count, tuple(steps))
    for number, low, high in whole:
        for order, member in enumerate(members):
            steps.append(Receive(member, low, high, Space.SCRATCH, _UP, number, Content.INPUT))
            finish = len(leaders) == 1 and order == len(members) - 1
            steps.append(Reduce(member, low, high, Space.WORK if order else Space.INPUT, finish))
    if len(leaders) > 1:
        alone = {lead for lead in leaders if len(ranks_of[hosts[lead]]) == 1}
        steps += _among_leaders(rank, cuts, alone)
    for number, low, high in whole:
        steps += [Send(member, low, high, Space.WORK, _DOWN, number, Content.RESULT) for member in members]
    return Schedule(name, rank, size, element_count, tuple(steps))


def _in_turn(cuts: Sequence[Cut]) -> list[tuple[int, int, int]]:
    """The segments of all shards: the first of each, then the second of each, numbered anew."""
    order = [cut[index] for index in range(max(map(len, cuts))) for cut in cuts if index < len(cut)]
    return [(number, low, high) for number, (_, low, high) in enumerate(order)]


def _among_leaders(rank: int, cuts: dict[int, list[tuple[int, int, int]]], alone: set[int]) -> list[Step]:
    """The butterfly among leaders over what each host has; of those ``alone`` on their hosts that is their input."""
    others = [lead for lead in cuts if lead != rank]
    steps: list[Step] = []
    own, own_content = (Space.INPUT, Content.INPUT) if rank in alone else (Space.WORK, Content.PARTIAL)
    longest = max(map(len, cuts.values()))
    for index in range(longest):
        for lead in others:
            if index < len(cuts[lead]):
                number, low, high = cuts[lead][index]
                steps.append(Send(lead, low, high, own, _SCATTER, number, own_content))
    for number, low, high in cuts[rank]:
        for order, lead in enumerate(others):
            content = Content.INPUT if lead in alone else Content.PARTIAL
            operand = Space.WORK if order else own
            steps.append(Receive(lead, low, high, Space.SCRATCH, _SCATTER, number, content))
            steps.append(Reduce(lead, low, high, operand, order == len(others) - 1))
    for index in range(longest):
        for lead in others:
            if index < len(cuts[rank]):
                number, low, high = cuts[rank][index]
                steps.append(Send(lead, low, high, Space.WORK, _GATHER, number, Content.RESULT))
            if index < len(cuts[lead]):
                number, low, high = cuts[lead][index]
                steps.append(Receive(lead, low, high, Space.WORK, _GATHER, number, Content.RESULT))
    return steps
