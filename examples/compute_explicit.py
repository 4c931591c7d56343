"""Say which device: python examples/compute_explicit.py [cpu | opencl | cuda:1 | ...]"""

import sys

import sparkle_mesh as sparkle
from sparkle_mesh.errors import UsageError

with sparkle.init() as context:
    print("devices here:", *(f"{device} ({device.name})" for device in context.devices))
    try:
        device = context.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    except UsageError as error:
        sys.exit(str(error))
    a = context.array((512, 512), dtype="float32", device=device).fill_random(seed=0)
    b = context.array((512, 512), dtype="float32", device=device).fill_random(seed=1)
    c = context.gemm(a, b, device=device)  # stays where it was computed
    print(f"{c!r}; c[0, 0] is {c[0, 0]:.4f}")  # what is read comes to the host
    print("expected:", f"{context.estimate_performance(lambda a, b: a @ b, a, b, device=device).seconds * 1e3:.3f} ms")
