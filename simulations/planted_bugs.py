"""Deliberate bugs, planted one at a time by a test, that simulated worlds must catch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

#: Gets pytest's ``MonkeyPatch``, and puts the bug in.
Plant: TypeAlias = Callable[[Any], None]


class PlantedBugs:
    """The bugs of one kind of world.

    Parameters
    ----------
    run
        Runs a seed; raises if it shows a bug.
    seeds
        Within which each bug is caught.
    """

    def __init__(self, run: Callable[[int], object], seeds: Iterable[int]) -> None:
        self._run, self._seeds = run, tuple(seeds)
        self._bugs: dict[str, tuple[Plant, int]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of all bugs, in their order."""
        return tuple(self._bugs)

    def bug(self, *, caught_by: int) -> Callable[[Plant], Plant]:
        """Register a bug, with a seed that catches it in little time: as long as it does, no other has to run."""

        def register(plant: Plant) -> Plant:
            self._bugs[plant.__name__] = plant, caught_by
            return plant

        return register

    def run(self, name: str, patch: Any) -> None:
        """Plant the bug and run seeds; returns only if none catches it."""
        plant, caught_by = self._bugs[name]
        plant(patch)
        for seed in (caught_by, *self._seeds):
            self._run(seed)
