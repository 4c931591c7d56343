"""Kernels that a device's compiler made, ready to run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np

from sparkle_mesh.devices.device import Device, Memory, Native, Shape
from sparkle_mesh.errors import UsageError

Argument: TypeAlias = "Memory | np.generic[Any]"


class CompiledKernel(ABC):
    """A compiled kernel of one device."""

    def __init__(self, device: Device, name: str) -> None:
        self.device = device
        self.name = name

    def launch(self, global_size: Shape, local_size: Shape | None, arguments: Sequence[Argument]) -> None:
        """Queue one run, and return at once.

        Parameters
        ----------
        global_size
            Work items (threads) in each of 1 to 3 dimensions. It is rounded up to whole groups: a kernel checks its
            bounds. Nothing runs if one of them is 0.
        local_size
            Work items of a group (block) in each dimension; None leaves it to the device.
        arguments
            In the order of the kernel's parameters: blocks of this device's memory, and NumPy scalars.

        Raises
        ------
        UsageError
            If sizes or arguments are not of this kind.
        DeviceError
            If the device refused it. A fault while it runs shows up at a later call.
        """
        sizes, groups = self._checked_sizes(global_size, local_size)
        checked = [self._checked(position, argument) for position, argument in enumerate(arguments)]
        if prod(sizes):
            self._launch(sizes, groups, checked)

    def prepared(
        self, global_size: Shape, local_size: Shape | None, numbers: Sequence[np.generic[Any]]
    ) -> Callable[[Iterable[Memory]], None]:
        """Return what queues runs that differ in their blocks alone, which are the first parameters.

        Parameters and errors are those of :meth:`launch`, but for ``numbers``: the arguments after the blocks. Sizes
        and numbers are checked now, and not each time.
        """
        sizes, groups = self._checked_sizes(global_size, local_size)
        checked = [self._checked(position, number) for position, number in enumerate(numbers)]
        native_of, is_nothing = self.device.native_of, not prod(sizes)

        def launch(blocks: Iterable[Memory]) -> None:
            natives = [*map(native_of, blocks), *checked]
            if not is_nothing:
                self._launch(sizes, groups, natives)

        return launch

    def _checked_sizes(
        self, global_size: Shape, local_size: Shape | None
    ) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        sizes = _sizes("global_size", global_size)
        groups = None if local_size is None else _sizes("local_size", local_size)
        if groups is not None:
            if len(groups) != len(sizes):
                raise UsageError(f"local_size is {groups}, and global_size {sizes}; give both as many dimensions")
            most = self.device.capabilities.local_size_max
            if not 0 < prod(groups) <= most:
                raise UsageError(f"local_size is {groups}; {self.device} takes groups of 1 to {most} work items")
            sizes = tuple(-(-size // group) * group for size, group in zip(sizes, groups, strict=True))
        return sizes, groups

    def _checked(self, position: int, argument: Argument) -> Native:
        if isinstance(argument, Memory):
            return self.device.native_of(argument)
        if isinstance(argument, np.generic) and not argument.dtype.hasobject:
            return argument
        raise UsageError(
            f"argument {position} of kernel {self.name} is {type(argument).__name__}; pass a block of memory, or a"
            " NumPy scalar of the parameter's type, as numpy.int32(7)"
        )

    @abstractmethod
    def _launch(self, global_size: tuple[int, ...], local_size: tuple[int, ...] | None, arguments: list[Any]) -> None:
        """Queue it; sizes are not 0, ``global_size`` is a multiple of ``local_size``."""


def _sizes(what: str, sizes: Shape) -> tuple[int, ...]:
    found = tuple(sizes)
    if not 1 <= len(found) <= 3 or any(isinstance(n, bool) or int(n) != n or n < 0 for n in found):
        raise UsageError(f"{what} is {sizes!r}; give 1 to 3 whole numbers, 0 or more")
    return tuple(map(int, found))
