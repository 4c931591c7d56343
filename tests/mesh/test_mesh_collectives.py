"""Collectives as programs of ordinary threads call them: two meshes in one process."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import sparkle_mesh as sparkle
from sparkle_mesh.errors import (
    CollectiveAbortedError,
    CollectiveTimeoutError,
    MeshClosedError,
    MismatchError,
    SparkleError,
    UsageError,
)


def on_both(data_dir: Path, call: Callable[[sparkle.Mesh], Any], **changes: Any) -> list[Any]:
    """Call on two meshes at the same time; return what each returned or raised, by rank."""
    results: dict[int, Any] = {}
    options = {"min_peers": 2, "timeout_s": 30, "data_dir": data_dir, "lan": False, "listen": ["/ip4/127.0.0.1/tcp/0"]}

    def run() -> None:
        with sparkle.join("run", **(options | changes)) as mesh:
            try:
                results[mesh.rank] = call(mesh)
            except Exception as error:
                results[mesh.rank] = error
            with suppress(SparkleError):  # what was raised before may have put the other out of step
                mesh.barrier()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results.get(rank) for rank in range(2)]


@pytest.mark.parametrize("links", [["tcp"], ["shared_memory", "tcp"]])
def test_every_collective(links: list[str], tmp_path: Path) -> None:
    def call(mesh: sparkle.Mesh) -> str:
        mine = np.arange(6.0).reshape(2, 3) + 10 * mesh.rank
        both = np.stack([np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(2, 3) + 10])
        np.testing.assert_array_equal(mesh.all_gather(mine), both)
        np.testing.assert_array_equal(mesh.reduce_scatter(mine, "max"), both[1][mesh.rank : mesh.rank + 1])
        gathered = mesh.gather(mine, root=1)
        assert gathered is None if mesh.rank == 0 else np.array_equal(gathered, both)
        row = mesh.scatter(both if mesh.rank == 0 else np.zeros((2, 3)))
        np.testing.assert_array_equal(row, both[mesh.rank])
        np.testing.assert_array_equal(mesh.all_to_all(mine), both[:, mesh.rank])
        total = mine.copy()
        assert mesh.reduce(total, root=1) is total
        np.testing.assert_array_equal(total, both.sum(0) if mesh.rank == 1 else mine)
        for op, expected in (("min", both[0]), ("prod", both.prod(0))):
            np.testing.assert_array_equal(mesh.all_reduce(mine.copy(), op), expected)
        packed = mesh.all_reduce(mine.astype(np.float32), compression=sparkle.Compression("int8"))
        np.testing.assert_allclose(packed, both.sum(0), atol=0.3)
        mean = mesh.all_reduce(mine.copy(), "mean", weight=mesh.rank)
        np.testing.assert_array_equal(mean, both[1])
        place = {"numbers": np.zeros((2, 3))}
        for source in range(2):
            if mesh.rank == source:
                mesh.send({"numbers": mine}, to=1 - source, tag="there and back")
            else:
                assert mesh.receive(place, source, tag="there and back") is place
                np.testing.assert_array_equal(place["numbers"], both[source])
        return str(mesh.explain(mine.nbytes))

    for text in on_both(tmp_path, call, links=links):
        assert "all_reduce of 48 bytes over 2 ranks: " in text, text
        assert "<- chosen" in text
        assert ("shared" in text) is ("shared_memory" in links)


def test_reductions_in_flight_and_their_progress(tmp_path: Path) -> None:
    seen: list[float] = []

    def call(mesh: sparkle.Mesh) -> int:
        arrays = [np.full(200_000, float(number), np.float32) for number in range(6)]
        pending = [mesh.all_reduce_async(array, tag=f"layer {number}") for number, array in enumerate(arrays)]
        between = mesh.all_reduce(np.ones(3))
        assert (between == 2).all()
        for number, each in enumerate(pending):
            assert each.wait(20) is arrays[number]
            assert (arrays[number] == 2 * number).all()
            assert each.done()
            assert each.progress == 1
            assert each.contributors == (0, 1)
            assert each.outcome is not None
            assert "done" in repr(each)
        mesh.all_reduce(np.ones(1_000_000), on_progress=seen.append)
        late = mesh.all_reduce_async(np.ones(5), tag="late") if mesh.rank == 0 else None
        if late is not None:
            with pytest.raises(CollectiveTimeoutError, match="it goes on"):
                late.wait(0.2, on_progress=seen.append)
        mesh.barrier()
        if late is None:
            mesh.all_reduce(np.ones(5), tag="late")
        else:
            late.wait()
        return len(seen)

    assert all(isinstance(count, int) for count in on_both(tmp_path, call, links=["tcp"]))
    assert seen
    assert all(0 <= each <= 1 for each in seen)


@pytest.mark.parametrize("links", [["tcp"], ["shared_memory", "tcp"]])
def test_what_is_cancelled_raises_on_all(tmp_path: Path, links: list[str]) -> None:
    cancelled = threading.Barrier(2)

    def call(mesh: sparkle.Mesh) -> str:
        array = np.ones(100)
        if mesh.rank == 0:
            pending = mesh.all_reduce_async(array)
            pending.cancel()
            cancelled.wait(20)
        else:
            # It has not called yet: nobody can have the result.
            cancelled.wait(20)
            pending = mesh.all_reduce_async(array)
        with pytest.raises(CollectiveAbortedError, match="cancelled"):
            pending.wait(20)
        assert (array == 1).all()
        pending.cancel()
        return str(mesh.all_reduce(np.ones(2)).tolist())

    assert on_both(tmp_path, call, links=links) == ["[2.0, 2.0]"] * 2


def test_devices_are_found(tmp_path: Path) -> None:
    def call(mesh: sparkle.Mesh) -> list[Any]:
        with pytest.raises(UsageError, match="kind 'gpu'"):
            mesh.find_devices("gpu")
        # Both are trainers of one machine, which tells of its processor once. What it has is known soon after joining.
        until = time.monotonic() + 20
        while not (found := mesh.find_devices("cpu", min_memory="1MB", limit=5)) and time.monotonic() < until:
            time.sleep(0.05)
        return [(one.device.kind, one.device.index, one.role) for one in found]

    assert on_both(tmp_path, call, links=["tcp"]) == [[("cpu", 0, "trainer")]] * 2


def test_what_has_ended_is_told_after_the_mesh_was_closed_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def call(mesh: sparkle.Mesh) -> list[Any]:
        done = mesh.all_reduce_async(np.ones(3))
        done.wait(20)
        failed = mesh.all_reduce_async(np.ones(3 + mesh.rank), tag="other")
        with pytest.raises(MismatchError):
            failed.wait(20)
        # Nobody else makes it.
        alone = mesh.all_reduce_async(np.ones(3), tag=f"alone {mesh.rank}")
        told: list[str] = []

        def wait() -> None:
            with pytest.raises(MeshClosedError):
                alone.wait(20)
            told.append("closed")

        waiting = threading.Thread(target=wait)
        waiting.start()
        mesh.barrier()
        mesh.close()
        waiting.join(20)
        assert told == ["closed"]
        assert (done.wait() == 2).all()
        done.cancel()
        with pytest.raises(MismatchError):
            failed.wait()
        return [done.contributors]

    assert on_both(tmp_path, call, links=["tcp"]) == [[(0, 1)]] * 2
    gc.collect()
    assert "nobody waited" not in caplog.text


def test_ranks_with_more_batches_go_on_without_the_others(tmp_path: Path) -> None:
    def call(mesh: sparkle.Mesh) -> list[float]:
        means = []
        for batch in mesh.uneven([1.0, 2.0] if mesh.rank == 0 else [10.0, 20.0, 30.0, 40.0]):
            gradients = {"w": np.full(3, batch), "b": np.full((), batch)}
            mesh.all_reduce(gradients, op="mean")
            count = [np.ones(1)]
            mesh.all_reduce(count, op="sum")
            weighted = mesh.all_reduce_async(np.full(2, batch), op="mean", weight=1 + 2 * mesh.rank).wait()
            means += [float(gradients["w"][0]), float(count[0][0]), float(weighted[0])]
        return means

    short, long = on_both(tmp_path, call)
    assert short == [5.5, 2, (1 + 30) / 4, 11, 2, (2 + 60) / 4]
    assert long == [*short, 30, 1, 30, 40, 1, 40]


async def test_so_they_do_in_trio_programs(tmp_path: Path) -> None:
    means: dict[int, list[float]] = {0: [], 1: []}

    async def member() -> None:
        options = {"min_peers": 2, "timeout_s": 30, "lan": False, "listen": ["/ip4/127.0.0.1/tcp/0"]}
        async with sparkle.open_mesh("run", data_dir=tmp_path, **options) as mesh:
            async for batch in mesh.uneven([1.0] if mesh.rank else [10.0, 20.0]):
                with pytest.raises(UsageError, match="uneven\\(\\) within uneven"):
                    await anext(aiter(mesh.uneven([1])))
                mean = await mesh.all_reduce(np.full(3, batch), op="mean")
                pending = mesh.all_reduce_async([np.full(2, batch)], op="sum")
                means[mesh.rank] += [float(mean[0]), float((await pending.wait())[0][0])]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(member)
        nursery.start_soon(member)
    assert means == {0: [5.5, 11, 20, 20], 1: [5.5, 11]}


async def test_a_loop_that_is_left_early_is_over_at_once(tmp_path: Path) -> None:
    async def batches() -> AsyncIterator[float]:
        for batch in (1.0, 2.0, 3.0):
            yield batch

    async def member() -> None:
        options = {"min_peers": 2, "timeout_s": 30, "lan": False, "listen": ["/ip4/127.0.0.1/tcp/0"]}
        async with sparkle.open_mesh("run", data_dir=tmp_path, **options) as mesh:
            async with aclosing(batches()) as mine:
                async for _ in mesh.uneven(mine):
                    await mesh.all_reduce(np.ones(1), op="mean")
                    break
            assert (await mesh.all_reduce(np.full(1, mesh.rank), op="max"))[0] == 1
            # Who has nothing at all is told so, and so are the others, at once.
            seen = []
            try:
                async for batch in mesh.uneven([] if mesh.rank else [1.0, 2.0]):
                    await mesh.all_reduce(np.full(1, batch), op="mean")
            except SparkleError as error:
                seen.append(error)
            assert "no batch at all" in str(seen[0])
            assert isinstance(seen[0], UsageError if mesh.rank else CollectiveAbortedError)
            await mesh.barrier()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(member)
        nursery.start_soon(member)


def test_what_other_threads_call_is_no_part_of_a_loop(tmp_path: Path) -> None:
    def call(mesh: sparkle.Mesh) -> list[float]:
        sums: list[float] = []

        def others() -> None:
            for number in range(30):
                sums.append(float(mesh.all_reduce(np.full(1, mesh.rank + number), "max", tag="metrics")[0]))

        thread = threading.Thread(target=others)
        thread.start()
        for _ in mesh.uneven(range(3 if mesh.rank == 0 else 12)):
            assert mesh.all_reduce(np.ones(3), op="mean")[0] == 1
        thread.join(30)
        return sums

    assert on_both(tmp_path, call) == [[float(number + 1) for number in range(30)]] * 2


def test_what_uneven_loops_cannot_do(tmp_path: Path) -> None:
    def call(mesh: sparkle.Mesh) -> Any:
        for _ in mesh.uneven([1]):
            with pytest.raises(UsageError, match="'max' within uneven"):
                mesh.all_reduce(np.ones(1), "max")
            with pytest.raises(UsageError, match="uneven\\(\\) within uneven"):
                next(iter(mesh.uneven([1])))
        for _ in mesh.uneven([1, 2] if mesh.rank else [1]):
            pass  # that nothing is reduced is no fault
        for batch in mesh.uneven([1] if mesh.rank else []):
            mesh.all_reduce(np.full(1, batch))

    none, some = on_both(tmp_path, call)
    assert "this rank has no batch at all" in str(none)
    assert isinstance(none, UsageError)
    assert "no batch at all" in str(some)
    assert isinstance(some, CollectiveAbortedError), some
