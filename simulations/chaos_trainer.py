"""One trainer of a chaos run: ``chaos_trainer.py MESH MIN_PEERS STOP_FILE``; see :mod:`simulations.chaos`.

It trains a linear model on data that it makes up, checks every sum against what its contributors put in, and says on
its output, line by line, what happens: words and numbers, beginning with the seconds of a clock that all processes of
a host share.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from hashlib import blake2b
from pathlib import Path

import numpy as np

import sparkle_mesh as sparkle
from sparkle_mesh.errors import SparkleError

PARAMETERS = 65_536
RATE = 0.05
#: Where training is to end: what the data were made from.
GOAL = np.linspace(-1, 1, PARAMETERS)


def say(*words: object) -> None:
    """Write one line, at once and whole."""
    os.write(1, f"{time.monotonic():.6f} {' '.join(map(str, words))}\n".encode())


def share(peer_id: str, step: int) -> int:
    """Return the number that a member puts into the sum of a step."""
    return int.from_bytes(blake2b(f"{peer_id} {step}".encode(), digest_size=4).digest(), "big")


def gradient(weights: np.ndarray, peer_id: str, step: int) -> np.ndarray:
    """Return the gradient of the squared distance to the goal, as noisy data of this member show it."""
    noise = np.random.default_rng(share(peer_id, step)).standard_normal(PARAMETERS)
    return weights - GOAL + 0.1 * noise


def train(mesh: sparkle.Mesh, stop: Path) -> None:
    """Train until all have seen the stop file."""
    state = {"weights": np.zeros(PARAMETERS), "losses": np.zeros(1)}
    step, stopped = 0, False
    while not stopped:
        done = mesh.synchronize(state, step, timeout_s=60)
        if done.bytes_received:
            say("behind", step, done.step, done.bytes_received)
        step = done.step
        facts = np.array([share(mesh.peer_id, step), stop.exists()], np.int64)
        mesh.all_reduce(facts, timeout_s=60)
        check(mesh, int(facts[0]), step)
        slope = gradient(state["weights"], mesh.peer_id, step)
        mesh.all_reduce(slope, op="mean", timeout_s=60)
        state["weights"] -= RATE * slope
        step += 1
        stopped = bool(facts[1])
        say("step", step, mesh.view.epoch, mesh.size, mesh.rank, ",".join(m.peer_id[-6:] for m in mesh.members))
    loss = float(np.mean((state["weights"] - GOAL) ** 2))
    say("end", step, f"{loss:.6g}", blake2b(state["weights"].tobytes(), digest_size=8).hexdigest())


def check(mesh: sparkle.Mesh, total: int, step: int) -> None:
    """The sum must be that of the members whose data are said to be in it."""
    outcome = mesh.last_outcome
    assert outcome is not None
    expected = sum(share(mesh.members[rank].peer_id, step) for rank in outcome.contributors)
    if total != expected or outcome.epoch != mesh.view.epoch:
        say("wrong", step, total, expected)
        os._exit(3)


def main() -> None:
    """Join, train, and join again if the others went on without this process."""
    name, min_peers, stop = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    with sparkle.join(name, min_peers=min_peers, timeout_s=60, lan=False) as mesh:
        say("joined", mesh.peer_id[-6:], mesh.view.epoch, mesh.size)
        try:
            train(mesh, stop)
        except SparkleError as error:
            say("error", type(error).__name__, str(error)[:200].replace("\n", " "))
            traceback.print_exception(error)
            sys.exit(4)


if __name__ == "__main__":
    main()
