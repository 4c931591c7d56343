"""One mesh of very many nodes: ``python -m simulations.scale --peers 1000 --minutes 5 --seed 0``.

Each node is started with the address of one other, drawn by lot. Then it is measured, in virtual time,

- when the graph of their connections hangs together, and when each of a sample of nodes finds the devices of all;
- how long searches take;
- what a peer sends and receives when nothing happens, and how many connections it has;
- after some are killed, when they are gone from all answers, and that nobody else is.

What is modelled, and how bytes are counted, is told in ``simulations/many_peers.py``.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio
import trio.testing

from simulations.many_peers import ManyPeers, Peer, bare_nursery
from simulations.network import InvariantBroken
from simulations.trio_run import deterministic_scheduling
from sparkle_mesh import limits

#: What is aimed at.
GOALS = {"bytes_per_s_median": 2000.0, "bytes_per_s_worst": 2000.0, "gone_s": 60.0}
#: Starts a second, in virtual time.
STARTS_PER_S = 20.0
SEARCHERS_COUNT = 10
STEP_TIMEOUT_S = 300.0
#: After the start, before idleness is measured: connections that are made only to get to know each other are over.
SETTLE_S = 120.0


class Scale:
    """One run; ``figures`` fill as it goes."""

    def __init__(self, count: int, minutes: float, seed: int, *, kill_count: int, say: Any = lambda text: None) -> None:
        self.count, self.minutes, self.seed, self.kill_count = count, minutes, seed, kill_count
        self.random = random.Random(seed)
        self.figures: dict[str, Any] = {"peers": count, "seed": seed}
        self._say = say
        self._times: list[float] = []

    def run(self) -> dict[str, Any]:
        """Run to the end; return the figures. Raises InvariantBroken if something does not come about."""
        started = time.perf_counter()
        with deterministic_scheduling(self.seed):
            trio.run(self._main, clock=trio.testing.MockClock(autojump_threshold=0))
        self.figures["real_s"] = time.perf_counter() - started
        return self.figures

    async def _main(self) -> None:
        async with bare_nursery() as nursery:
            self._world = ManyPeers(nursery, self.random)
            await self._form()
            await self._idle()
            if self.kill_count:
                await self._kill_some()
            nursery.cancel_scope.cancel()

    def _note(self, text: str) -> None:
        self._say(f"{trio.current_time():8.1f} s  {text}")

    def _broken(self, what: str) -> InvariantBroken:
        return InvariantBroken(f"seed {self.seed}: {what}")

    async def _form(self) -> None:
        world = self._world
        for number in range(self.count):
            await world.start(self.random.choice(world.peers) if world.peers else None)
            if (number + 1) % 100 == 0:
                self._note(f"{number + 1} are started")
            await trio.sleep(1 / STARTS_PER_S)
        started_at = trio.current_time()
        if not await world.until(lambda: len(world.parts()) == 1, STEP_TIMEOUT_S):
            raise self._broken(f"after {STEP_TIMEOUT_S:g} s there are {len(world.parts())} parts")
        self.figures["one_mesh_s"] = trio.current_time() - started_at
        self._note("they are one mesh; searching")
        everyone = {peer.peer_id for peer in world.alive}
        self.searchers = self.random.sample(world.peers, min(SEARCHERS_COUNT, self.count))
        for searcher in self.searchers:
            await self._until_found(searcher, everyone, started_at)
        self.figures["all_found_s"] = trio.current_time() - started_at
        self._note("all are found by the sample")

    async def _search(self, searcher: Peer) -> set[str]:
        started_at = trio.current_time()
        found = await self._world.found_by(searcher)
        self._times.append(trio.current_time() - started_at)
        return found

    async def _until_found(self, searcher: Peer, everyone: set[str], started_at: float) -> None:
        while (found := await self._search(searcher)) != everyone:
            if trio.current_time() > started_at + STEP_TIMEOUT_S:
                raise self._broken(f"{searcher.peer_id} does not find {len(everyone - found)} of {self.count}")
            await trio.sleep(1.0)

    async def _idle(self) -> None:
        world, network = self._world, self._world.network
        await trio.sleep(SETTLE_S)
        self._times.clear()
        for searcher in self.searchers:
            found = await self._search(searcher)
            if len(found) != self.count:
                raise self._broken(f"{searcher.peer_id} finds {len(found)} of {self.count} in an idle mesh")
        self.figures["search_s"] = statistics.median(self._times)
        self.figures["search_worst_s"] = max(self._times)
        await trio.sleep(limits.DEGREE_IDLE_S + 2 * limits.DEGREE_LOOK_S)
        network.count_probes()
        before = {p.peer_id: (network.sent[p.peer_id], network.received[p.peer_id]) for p in world.alive}
        made_before = network.connections_made
        self._note("idle")
        for minute in range(round(self.minutes)):
            await trio.sleep(60.0)
            network.count_probes()
            self._note(f"idle for {minute + 1} min")
        seconds = 60.0 * round(self.minutes)
        sent = {p: (network.sent[p] - s) / seconds for p, (s, _) in before.items()}
        received = {p: (network.received[p] - r) / seconds for p, (_, r) in before.items()}
        both = [sent[p] + received[p] for p in sent]
        self.figures["sent_bytes_per_s_median"] = statistics.median(sent.values())
        self.figures["bytes_per_s_median"] = statistics.median(both)
        self.figures["bytes_per_s_worst"] = max(both)
        self.figures["peers_over_goal"] = sum(one > GOALS["bytes_per_s_worst"] for one in both)
        degrees = [len(p.fabric.connected_peers()) for p in world.alive]
        self.figures["connections_median"] = statistics.median(degrees)
        self.figures["connections_worst"] = max(degrees)
        self.figures["connections_made_per_peer_per_min"] = (
            (network.connections_made - made_before) / self.count / (seconds / 60)
        )
        self.figures["records_held_worst"] = max(len(p.node.capabilities.store) for p in world.alive)
        if len(world.parts()) != 1:
            raise self._broken("the mesh has fallen apart")

    async def _kill_some(self) -> None:
        world = self._world
        candidates = [peer for peer in world.alive if peer not in self.searchers]
        killed = self.random.sample(candidates, min(self.kill_count, len(candidates)))
        for peer in killed:
            world.kill(peer)
        gone, left = {peer.peer_id for peer in killed}, {peer.peer_id for peer in world.alive}
        killed_at = trio.current_time()
        self._note(f"{len(killed)} are killed")
        self._times.clear()
        missing = 0

        async def search_until_gone(searcher: Peer) -> None:
            nonlocal missing
            while (found := await self._search(searcher)) & gone:
                missing = max(missing, len(left - found))
                if trio.current_time() > killed_at + 4 * GOALS["gone_s"]:
                    raise self._broken(f"{len(found & gone)} of the killed are found after {4 * GOALS['gone_s']:g} s")
                await trio.sleep(1.0)

        async with bare_nursery() as nursery:
            for searcher in self.searchers:
                nursery.start_soon(search_until_gone, searcher)
        self.figures["gone_s"] = trio.current_time() - killed_at
        self.figures["search_while_dying_s"] = statistics.median(self._times)
        self.figures["missing_while_dying"] = missing
        if not await world.until(lambda: len(world.parts()) == 1, STEP_TIMEOUT_S):
            raise self._broken(f"after the deaths there are {len(world.parts())} parts")
        for searcher in self.searchers:
            await self._until_found_again(searcher, left, killed_at)
        self._note("all that are left are found")

    async def _until_found_again(self, searcher: Peer, left: set[str], killed_at: float) -> None:
        while (found := await self._search(searcher)) != left:
            if trio.current_time() > killed_at + STEP_TIMEOUT_S:
                raise self._broken(f"{searcher.peer_id} does not find {len(left - found)} of the living")
            await trio.sleep(1.0)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of idleness (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="all chance follows from it (default: %(default)s)")
    parser.add_argument("--kill", type=int, help="how many die in the end (default: a tenth)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, for programs")
    options = parser.parse_args(arguments)
    if options.peers < 2 or options.minutes < 1:
        parser.error("--peers must be at least 2, and --minutes at least 1")
    options.kill = options.peers // 10 if options.kill is None else options.kill
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print each figure beside its goal; exit code 1 if the mesh did not do what it must."""
    options = parse_options(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    run = Scale(options.peers, options.minutes, options.seed, kill_count=options.kill, say=say)
    failure = None
    log = logging.getLogger("sparkle_mesh")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        run.run()
    except InvariantBroken as error:
        failure = str(error)
    finally:
        log.setLevel(level)
    for name, value in run.figures.items():
        goal = f"   (goal: under {GOALS[name]:g})" if name in GOALS else ""
        print(f"{name:34} {value:10.5g}{goal}")
    if options.json:
        options.json.write_text(json.dumps(run.figures, indent=1) + "\n")
    if failure is not None:
        print(f"failed: {failure}")
    return 0 if failure is None else 1


if __name__ == "__main__":
    sys.exit(main())
