"""What a package needs that brings Sparkle devices of its own, under the entry-point group ``sparkle_mesh.backends``.

A worked one is in ``examples/backend_example``. These names stay as they are between versions; what lies below does
not.
"""

from __future__ import annotations

from sparkle_mesh.devices.buffers import Buffer
from sparkle_mesh.devices.compiled import CompiledKernel
from sparkle_mesh.devices.detect import DeviceInfo
from sparkle_mesh.devices.device import Backend, Device, DeviceCapabilities, Memory
from sparkle_mesh.devices.products import Product
from sparkle_mesh.kernels.ops import TensorType
from sparkle_mesh.kernels.program import (
    Body,
    ElementwiseStep,
    Instruction,
    MatmulStep,
    Program,
    ReduceStep,
    Step,
    View,
    WriteStep,
)
from sparkle_mesh.kernels.runners import Data, Prepared, RunsPrograms, Stop

__all__ = [
    "Backend",
    "Body",
    "Buffer",
    "CompiledKernel",
    "Data",
    "Device",
    "DeviceCapabilities",
    "DeviceInfo",
    "ElementwiseStep",
    "Instruction",
    "MatmulStep",
    "Memory",
    "Prepared",
    "Product",
    "Program",
    "ReduceStep",
    "RunsPrograms",
    "Step",
    "Stop",
    "TensorType",
    "View",
    "WriteStep",
]
