"""The smallest mesh program: start it in two terminals, or on two machines of one network."""

import sys

import numpy as np

import sparkle_mesh as sparkle

with sparkle.join(sys.argv[1] if len(sys.argv) > 1 else "hello-mesh", min_peers=2) as mesh:
    numbers = np.full(4, mesh.rank + 1.0)
    mesh.all_reduce(numbers)  # in place: afterwards every rank holds the sum
    print(f"rank {mesh.rank} of {mesh.size}: the sum over all ranks is {numbers}")
