"""One-sided reductions under every kind of interleaving: ranks that stop between any two words, die, or abort.

Every rank runs in a thread of its own, one at a time; whenever it touches a board, a seeded choice says who goes on.
What must hold whatever happens: survivors all end with the same, right result, or all with arrays as they were.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from sparkle_mesh import limits
from sparkle_mesh.collectives.board import Boards, Word, count_of, counted
from sparkle_mesh.collectives.reduction import Reduction
from sparkle_mesh.collectives.shared import AbortedError, SharedReduction, try_to_abort
from sparkle_mesh.collectives.shared_plan import Place, SharedLane, plan_chunks, work_bytes

NUMBER = 7
DTYPE = np.dtype(np.float32)


class Died(BaseException):
    """The process of a rank is gone."""


@dataclass
class World:
    """The boards and memories of all ranks, and who runs."""

    size: int
    random: random.Random
    #: After how many steps which ranks die, and who then tries to abort.
    deaths: dict[int, int] = field(default_factory=dict)
    aborts: dict[int, int] = field(default_factory=dict)
    #: Which ranks make more calls after one that was aborted.
    goes_on: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.words = [[0] * 128 for _ in range(self.size)]
        self.memories = [bytearray(2**16) for _ in range(self.size)]
        self.batons = [threading.Semaphore(0) for _ in range(self.size)]
        self.running = set(range(self.size))
        self.steps = dict.fromkeys(range(self.size), 0)
        self.dead: list[int] = []
        self.lost: list[dict[int, str]] = [{} for _ in range(self.size)]
        self.given_up = [False] * self.size
        self.stuck = 0
        self.overrun = False

    def pass_on(self) -> None:
        """Let somebody run."""
        if self.running:
            self.batons[self.random.choice(sorted(self.running))].release()

    def step(self, rank: int) -> None:
        """A rank touches a board: perhaps others go on before it does, perhaps it never does."""
        self.steps[rank] += 1
        self.stuck += 1
        if self.stuck > 20_000:
            self.overrun = True
        if self.overrun or self.deaths.get(rank) == self.steps[rank]:
            raise Died
        self.pass_on()
        self.batons[rank].acquire()
        # The others learn of a death sooner or later, each in its own time.
        for dead in self.dead:
            if self.random.random() < 0.2:
                self.lost[rank][dead] = "died"


class StepBoards:
    """The boards as one rank has them. Stores and loads happen in the order of the steps."""

    in_thread = True

    def __init__(self, world: World, rank: int) -> None:
        self._world, self._rank = world, rank
        self._own, self._words, self._aborting = world.words[rank], world.words, False

    def note_aborted(self, operation: int) -> None:
        self._world.step(self._rank)
        Boards.note_aborted(cast(Boards, self), operation)

    def was_aborted(self, operation: int) -> bool:
        self._world.step(self._rank)
        return Boards.was_aborted(cast(Boards, self), operation)

    def get(self, rank: int, word: int) -> int:
        self._world.step(self._rank)
        return self._world.words[rank][word]

    def counts(self, word: Word, operation: int) -> list[int]:
        counts = []
        for words in self._world.words:
            self._world.step(self._rank)
            counts.append(count_of(words[word], operation))
        return counts

    def least(self, word: Word, operation: int) -> int:
        said = []
        for words in self._world.words:
            self._world.step(self._rank)
            said.append(words[word])
        # As on real boards: whoever is at a later operation counts as done with this one.
        return count_of(min(said), operation)

    def publish(self, word: Word, value: int) -> None:
        self._world.step(self._rank)
        self._world.words[self._rank][word] = value
        self._world.stuck = 0
        self._world.step(self._rank)

    def ring_all(self) -> None:
        self._world.step(self._rank)

    def have_left(self, _lost: object) -> bool:
        # Here nobody goes on to another group.
        return False

    async def until(self, *_conditions: tuple[Word, int]) -> None:
        self._world.step(self._rank)

    async def sleep(self) -> None:
        self._world.step(self._rank)

    async def let_others_run(self) -> None:
        self._world.step(self._rank)


@dataclass
class Rank:
    """One rank's array and how it ended: ``done``, ``aborted``, ``died`` or ``failed``."""

    data: np.ndarray[Any, Any]
    end: str = ""
    error: BaseException | None = None


def run_rank(world: World, rank: int, me: Rank, memories: dict[int, Any]) -> None:
    world.batons[rank].acquire()
    try:
        boards: Any = StepBoards(world, rank)
        nbytes = work_bytes((me.data.size,), (4,), world.size)
        reduction = SharedReduction(
            boards,
            {other: memory for other, memory in memories.items() if other != rank},
            rank=rank,
            number=NUMBER,
            lanes=[SharedLane(me.data, Place.ARENA, 0)],
            reduction=Reduction("sum", world.size),
            work=np.frombuffer(world.memories[rank], np.uint8, nbytes, 2**15),
            lost=world.lost[rank],
            given_up=lambda: world.given_up[rank],
        )
        running = reduction.run()
        if rank in world.aborts:
            # At some word of its way, this rank is given up: what stands on the boards decides.
            boards.publish = aborting(world, rank, reduction, boards.publish)
        try:
            running.send(None)
        except StopIteration:
            me.end = "done"
    except AbortedError:
        me.end = "aborted"
        go_on(boards, rank in world.goes_on)
    except Died:
        me.end = "died"
    except BaseException as error:
        me.end, me.error = "failed", error
    finally:
        if me.end == "died":
            world.dead.append(rank)
        world.running.discard(rank)
        world.pass_on()


def go_on(boards: StepBoards, to_more: bool) -> None:
    """A rank whose call was aborted makes more, which are aborted as well, as long as another is still at the first."""
    for number in (NUMBER + 1, NUMBER + 2) if to_more else ():
        try:
            boards.publish(Word.REDUCED, counted(number, 1))
            try_to_abort(cast(Boards, boards), number, 2**31)
        except Died:
            return


def aborting(world: World, rank: int, reduction: SharedReduction, publish: Any) -> Any:
    left = [world.aborts[rank]]

    def publish_or_abort(word: Word, value: int) -> None:
        publish(word, value)
        if word in (Word.REDUCED, Word.TAKEN):
            left[0] -= 1
            if not left[0] and reduction.try_to_abort():
                world.given_up[rank] = True
                raise AbortedError

    return publish_or_abort


def play(world: World, elements: int) -> list[Rank]:
    ranks = []
    for rank in range(world.size):
        data = np.frombuffer(world.memories[rank], DTYPE, elements)
        data[:] = np.arange(elements) + 1000 * rank
        ranks.append(Rank(data))
    memories = {
        rank: SimpleNamespace(arena=SimpleNamespace(view=lambda at, n, m=memory: memoryview(m)[at : at + n]))
        for rank, memory in enumerate(world.memories)
    }
    for words in world.words:
        words[Word.LANES], words[Word.LANES + 1], words[Word.WORK] = Place.ARENA, 0, 2**15
    threads = [
        threading.Thread(target=run_rank, args=(world, rank, ranks[rank], memories)) for rank in range(world.size)
    ]
    for thread in threads:
        thread.start()
    world.pass_on()
    for thread in threads:
        thread.join()
    return ranks


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, fresh_plans: None) -> None:
    monkeypatch.setattr(limits, "SHARED_CHUNK_BYTES", 256)
    monkeypatch.setattr(limits, "SHARED_BLOCK_BYTES", 64)
    monkeypatch.setattr(limits, "LINK_TURN_BYTES", 64)


def check(world: World, ranks: list[Rank], elements: int) -> str:
    assert not world.overrun, "nobody gets any further"
    result = np.arange(elements) * world.size + 1000 * sum(range(world.size))
    survivors = [rank for rank in ranks if rank.end != "died"]
    ends = {rank.end for rank in survivors}
    assert len(ends) <= 1, [(rank.end, rank.error) for rank in ranks]
    for number, rank in enumerate(ranks):
        if rank.end == "done":
            np.testing.assert_array_equal(rank.data, result)
        elif rank.end == "aborted":
            np.testing.assert_array_equal(rank.data, np.arange(elements) + 1000 * number)
        else:
            assert rank.end == "died", rank.error
    return ends.pop() if ends else "died"


@pytest.mark.parametrize(
    "faults", ["none", "death", "abort", "death and abort", "two deaths", "two aborts", "abort and more"]
)
def test_survivors_end_alike(faults: str) -> None:
    ends: dict[str, int] = {}
    for seed in range(150):
        chance = random.Random(f"{faults} {seed}")
        size, elements = chance.choice([2, 3, 4]), chance.choice([1, 40, 64, 200, 450])
        world = World(size, chance)
        deaths = {"death": 1, "death and abort": 1, "two deaths": 2}.get(faults, 0)
        aborts = {"abort": 1, "death and abort": 1, "two aborts": 2, "abort and more": 1}.get(faults, 0)
        if faults == "abort and more":
            world.goes_on = frozenset(range(size))
        for rank in chance.sample(range(size), min(deaths, size - 1)):
            world.deaths[rank] = chance.randrange(1, 150)
        for rank in chance.sample(range(size), min(aborts, size)):
            world.aborts[rank] = chance.choice([1, 1, 1, 2, 3, 5])
        try:
            end = check(world, play(world, elements), elements)
        except AssertionError as error:
            error.add_note(f"faults {faults!r}, seed {seed}, size {size}, elements {elements}")
            raise
        ends[end] = ends.get(end, 0) + 1
    assert ends.get("done", 0) > 10, ends
    assert (ends.get("aborted", 0) > 10) is (faults != "none"), ends


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("whole", [True, False])
def test_chunks_and_parts_cover_everything_once(size: int, whole: bool) -> None:
    for counts in ([], [0], [1], [3], [10000], [5, 0, 700], [64, 65]):
        for item_bytes in (1, 2, 4, 8):
            plan = plan_chunks(tuple(counts), (item_bytes,) * len(counts), size, whole=whole)
            covered = [np.zeros(count, int) for count in counts]
            room = work_bytes(tuple(counts), (item_bytes,) * len(counts), size)
            in_use: dict[int, tuple[int, int]] = {}
            for index, chunk in enumerate(plan.chunks):
                for rank in range(size):
                    low, high = chunk.part_of(rank)
                    assert high - low <= chunk.part
                    if high > low:
                        covered[chunk.lane][low:high] += 1
                span = (chunk.work_at, chunk.work_at + chunk.part * item_bytes)
                assert span[1] <= room
                assert span[0] % item_bytes == 0
                # Chunks that may be on their way at the same time do not share memory.
                for other in range(max(index - plan.ahead + 1, 0), index):
                    assert span[1] <= in_use[other][0] or in_use[other][1] <= span[0]
                in_use[index] = span
            assert all((each == 1).all() for each in covered)
            assert 1 <= plan.commit_at <= len(plan.chunks)
