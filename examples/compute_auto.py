"""Let Sparkle decide where a kernel runs, and have it say why."""

from typing import Any

import numpy as np

import sparkle_mesh as sparkle


@sparkle.kernel
def distances(points: Any, center: Any) -> Any:
    return np.sqrt(((points - center) ** 2).sum(axis=1))


with sparkle.init() as context:
    points = context.array((200_000, 16)).fill_random(seed=0)  # float32, uniform in [0, 1)
    center = points.mean(axis=0)
    print(context.explain(distances, points, center))  # the first time, devices are measured for it
    far = context.run(distances, points, center)  # on the fastest
    print(f"{far!r}: from {far.min():.3f} to {far.max():.3f}")
