"""The cost model chooses alike everywhere, and sensibly."""

from __future__ import annotations

import pytest

from sparkle_mesh import limits
from sparkle_mesh.collectives.cost import (
    ALL_REDUCE_ALGORITHMS,
    LinkCost,
    binary_tree_s,
    chain_s,
    choose_algorithm,
    direct_s,
    ring_s,
    segment_bytes,
    tree_s,
)
from sparkle_mesh.errors import UsageError


def test_little_data_goes_directly_or_by_tree_and_much_by_ring() -> None:
    for size in (4, 7, 8, 16, 64):
        assert choose_algorithm(64, size) == ("direct" if size < 64 else "tree")
        assert choose_algorithm(limits.COLLECTIVE_EAGER_MAX_BYTES + 1, size) != "direct"
        assert choose_algorithm(256 * limits.MIB, size) == "ring"


def test_broadcast_goes_by_chain_or_binary_tree() -> None:
    assert choose_algorithm(256 * limits.MIB, 4, kind="broadcast") == "chain"
    assert choose_algorithm(64, 16, kind="broadcast") == "binary_tree"


def test_the_one_asked_for_is_taken_or_refused() -> None:
    for name in ALL_REDUCE_ALGORITHMS:
        assert choose_algorithm(1, 4, asked=name) == name
    with pytest.raises(UsageError, match=r"algorithm 'magic' is not one of 'auto', 'ring', 'tree'"):
        choose_algorithm(1, 4, asked="magic")


@pytest.mark.parametrize("model", [ring_s, tree_s, direct_s, chain_s, binary_tree_s])
def test_more_data_slower_links_and_more_ranks_never_cost_less(model: object) -> None:
    assert callable(model)
    sizes = [2, 4, 8, 16]
    volumes = [0, 1000, 10**6, 10**8]
    for size in sizes:
        times = [model(nbytes, size, LinkCost()) for nbytes in volumes]
        assert times == sorted(times)
        assert model(10**6, size, LinkCost(1e-2, 1e-9)) > model(10**6, size, LinkCost(1e-4, 1e-9))
        assert model(10**6, size, LinkCost(1e-4, 1e-7)) > model(10**6, size, LinkCost(1e-4, 1e-9))


def test_the_ring_approaches_twice_the_wire() -> None:
    cost = LinkCost(alpha_s=0.0, beta_s_per_byte=1e-9)
    assert ring_s(10**9, 4, cost) == pytest.approx(1.5)


def test_segments_have_bounds_and_keep_elements_whole() -> None:
    for nbytes in (0, 1, 10**5, 10**7, 10**10):
        for parts in (1, 4, 64):
            size = segment_bytes(nbytes, parts)
            assert limits.COLLECTIVE_SEGMENT_MIN_BYTES <= size <= limits.COLLECTIVE_SEGMENT_BYTES
            assert size % 64 == 0
