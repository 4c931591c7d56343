"""Several devices share one kernel. With one device alone that one does it all."""

from typing import Any

import numpy as np

import sparkle_mesh as sparkle


@sparkle.kernel
def wave(x: Any) -> Any:
    return np.sin(x) * np.exp(-x)


with sparkle.init() as context:
    x = np.linspace(0, 5, 4_000_000, dtype=np.float32)
    context.run(wave, x, device=context.devices)  # the first time it is compiled
    with context.profile() as profile:
        y = context.run(wave, x, device=context.devices)
    print(profile)
    done = dict.fromkeys((event.device for event in profile.events), 0.0)
    for event in profile.events:
        done[event.device] += float(event.details["flops"])
    for device, flops in done.items():
        print(f"{device} did {flops / sum(done.values()):.0%}")
    print("all of it right:", np.allclose(y, np.sin(x) * np.exp(-x), atol=1e-6))
