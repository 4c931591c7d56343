"""The cost model chooses alike everywhere, and sensibly."""

from __future__ import annotations

import dataclasses

import pytest

from sparkle_mesh import limits
from sparkle_mesh.collectives.cost import (
    ALL_REDUCE_ALGORITHMS,
    MODELS,
    PROCESSOR,
    Model,
    choose_algorithm,
    predict_s,
    predictions,
    segment_bytes,
)
from sparkle_mesh.collectives.topology import Topology
from sparkle_mesh.collectives.traffic import crossings
from sparkle_mesh.errors import UsageError

EVERY_MODEL = [model for kind in ("all_reduce", "broadcast") for model in MODELS[kind].values()]


def test_little_data_goes_directly() -> None:
    for size in (2, 4):
        assert choose_algorithm(64, Topology(size)) == "direct"
    for size in (2, 4, 7, 8):
        assert choose_algorithm(4 * limits.MIB, Topology(size)) != "direct"


def test_broadcast_and_reduce_go_by_chain_or_binary_tree() -> None:
    for kind in ("broadcast", "reduce"):
        assert choose_algorithm(256 * limits.MIB, Topology(4), kind=kind) == "chain"
        assert choose_algorithm(64, Topology(16, tuple(range(16))), kind=kind) == "binary_tree"


def test_the_one_asked_for_is_taken_or_refused() -> None:
    for name in ALL_REDUCE_ALGORITHMS:
        assert choose_algorithm(1, Topology(4), asked=name) == name
    with pytest.raises(UsageError, match=r"algorithm 'magic' is not one of 'auto', 'ring', 'tree'.*'shared'"):
        choose_algorithm(1, Topology(4), asked="magic")
    with pytest.raises(UsageError, match=r"algorithm 'ring' is not one of 'auto', 'chain', 'binary_tree'$"):
        choose_algorithm(1, Topology(4), kind="reduce", asked="ring")


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_more_data_slower_lines_and_slower_processors_never_cost_less(model: Model) -> None:
    volumes = [0, 1000, 10**6, 10**8]
    for size in (2, 3, 4, 8, 16):
        usual = Topology(size)
        far = Topology(size, latency_s=((1.0,) * size,) * size)
        narrow = Topology(size, lines_bytes_per_s=(1e6,) * size)
        times = [predict_s(model(nbytes, usual), nbytes, usual) for nbytes in volumes]
        assert times == sorted(times)
        for worse in (far, narrow):
            assert predict_s(model(10**6, worse), 10**6, worse) > times[2]
        slow = dataclasses.replace(PROCESSOR, message_s=1.0)
        assert predict_s(model(10**6, usual), 10**6, usual, slow) > times[2]


def test_nothing_costs_nothing_alone() -> None:
    assert set(predictions(100, Topology(1)).values()) == {0.0}


def test_a_hierarchy_is_for_several_ranks_on_one_of_several_hosts() -> None:
    assert "hierarchical" not in predictions(10**6, Topology(4))
    assert "hierarchical" not in predictions(10**6, Topology(4, hosts=(0, 1, 2, 3)))
    assert "hierarchical" in predictions(10**6, Topology(4, hosts=(0, 0, 1, 2)))


def test_what_crosses_from_host_to_host_is_that_of_the_schedules() -> None:
    ways = Topology(4, (0, 1, 0, 1), (125e6,) * 4)
    assert crossings("hierarchical", ways) == (1.0,) * 4
    # The ring goes round a host before it leaves it.
    assert ways.ring_order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 1, 3, 2), (0, 3, 1, 2))
    assert crossings("ring", ways) == (1.5,) * 4
    assert crossings("direct", ways) == (4.0,) * 4
    assert crossings("butterfly", Topology(4, (0, 0, 0, 0))) == (0.0,) * 4
    many = limits.TRAFFIC_RANKS_MAX_COUNT + 1
    assert crossings("ring", Topology(many, tuple(range(many)))) is None
    for nbytes in (limits.MIB, 64 * limits.MIB):
        assert choose_algorithm(nbytes, ways) == "hierarchical"
    assert set(predictions(10**6, Topology(limits.TRAFFIC_RANKS_MAX_COUNT + 1))) >= {"ring", "tree"}


def test_a_slow_line_makes_the_butterfly_the_choice() -> None:
    uneven = Topology(4, (0, 1, 2, 3), (125e6, 125e6, 125e6, 12.5e6), ((1e-3,) * 4,) * 4)
    assert choose_algorithm(16 * limits.MIB, uneven) == "butterfly"
    # The slow one sends and receives the vector once.
    assert predictions(16 * limits.MIB, uneven)["butterfly"] < 1.1 * 16 * limits.MIB / 12.5e6


def test_segments_have_bounds_and_keep_elements_whole() -> None:
    for nbytes in (0, 1, 10**5, 10**7, 10**10):
        for parts in (1, 4, 64):
            size = segment_bytes(nbytes, parts)
            assert limits.COLLECTIVE_SEGMENT_MIN_BYTES <= size <= limits.COLLECTIVE_SEGMENT_BYTES
            assert size % 64 == 0
