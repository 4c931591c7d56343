"""Kernels made of Python functions: run once with arrays that have types and no elements, kept as graphs.

The function is never shipped, and runs once for each combination of shapes, dtypes and static arguments. Plain numbers
among the arguments are operands like arrays: another value is no new trace.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, update_wrapper
from inspect import BoundArguments
from threading import Lock
from typing import Annotated, Any, Protocol, TypeAlias, TypeVar, get_type_hints, overload

import numpy as np

from sparkle_mesh import limits
from sparkle_mesh.errors import KernelError, TraceError
from sparkle_mesh.kernels.graph import Graph, GraphBuilder
from sparkle_mesh.kernels.ops import FLOATS, TensorType, as_dtype, check_type
from sparkle_mesh.kernels.reference import evaluate
from sparkle_mesh.kernels.structure import Static as _Static
from sparkle_mesh.kernels.structure import Structure, flatten, static_structure
from sparkle_mesh.kernels.tracer import Tracer
from sparkle_mesh.kernels.values import Trace, Value, as_number, is_tracing, located, owner, tracing

_T = TypeVar("_T")
#: Annotates arguments that are known when a kernel is traced: ``def f(x, axis: Static[int])``.
Static: TypeAlias = Annotated[_T, _Static]
# What plain numbers are in a graph, until it is known what they are combined with.
_WEAK = {bool: "bool", int: "int64", float: "float64"}


class Execute(Protocol):
    """Computes a graph; ``name`` is the kernel's, for those who measure.

    Operands are as the caller gave them, arrays or what has a shape and a dtype, but for plain numbers, which are NumPy
    arrays of the graph's dtypes; results are in the order of the graph's outputs.
    """

    def __call__(self, graph: Graph, operands: Sequence[Any], name: str, /) -> Sequence[Any]: ...


def execute_by_numpy(graph: Graph, operands: Sequence[Any], name: str = "") -> list[np.ndarray[Any, Any]]:
    """Compute ``graph`` by NumPy in this thread, one operation after the other; results share no memory."""
    arrays = [np.asarray(operand) for operand in operands]
    return [np.array(result, order="C") for result in evaluate(graph, arrays)]


_execute: Execute = execute_by_numpy


def set_execute(execute: Execute) -> Execute:
    """Have calls of kernels computed by ``execute`` from now on, in all threads; return what did so before."""
    global _execute
    before, _execute = _execute, execute
    return before


@dataclass(frozen=True)
class Leaf:
    """The type of one operand; of a plain number its dtype is that of its kind."""

    type: TensorType
    is_weak: bool = False


@dataclass(frozen=True)
class Traced:
    """A kernel for operands of certain types.

    Attributes
    ----------
    graph
        What is computed.
    arguments
        A dict of the arguments by name, in the order of the signature; its arrays are the graph's inputs.
    paths
        Where each input is among them, for messages.
    results
        The structure of what is returned; its arrays are the graph's outputs.
    """

    graph: Graph
    arguments: Structure
    paths: tuple[str, ...]
    results: Structure


@dataclass(frozen=True)
class Call:
    """A kernel with operands: what is to be computed, and how results are handed back.

    Attributes
    ----------
    operands
        As for :class:`Execute`.
    """

    traced: Traced
    operands: tuple[Any, ...]

    @property
    def graph(self) -> Graph:
        """What is computed."""
        return self.traced.graph

    def rebuild(self, results: Sequence[Any]) -> Any:
        """Return ``results`` in the structure that the kernel's function returns."""
        return self.traced.results.build(iter(results))


class Kernel:
    """A function over arrays that is traced into a graph when it is called. Made by :func:`kernel`.

    Parameters
    ----------
    function
        Takes and returns arrays, alone or in lists, tuples and dicts.
    name
        For messages; the function's by default.
    static
        The names of arguments that are known when the function is traced; each value is a trace of its own.

    Raises
    ------
    KernelError
        If ``static`` names what the function does not take, or the function is a ufunc.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        static: Sequence[str] = (),
        _derive: tuple[Callable[[Traced], Traced], ...] = (),
    ) -> None:
        if isinstance(function, np.ufunc):
            raise KernelError(f"numpy.{function.__name__} is no function of Python; write lambda x: … around it")
        update_wrapper(self, function)
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        if not callable(function):
            raise TraceError(f"{function!r} is no function; a kernel is one that takes and returns arrays")
        self.signature = inspect.signature(function)
        self.static = frozenset((static,) if isinstance(static, str) else static) | _annotated(function)
        self._derive = _derive
        self._traces: OrderedDict[Any, Traced] = OrderedDict()
        self._lock = Lock()
        for one in self.static:
            if one not in self.signature.parameters:
                raise KernelError(f"kernel {self.name!r} has no argument {one!r} that could be static")

    def __repr__(self) -> str:
        return f"<kernel {self.name}{self.signature}>"

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Compute the function; within another kernel that is traced, become part of it.

        Returns
        -------
        Any
            What the function returns, with arrays in the place of what was traced.

        Raises
        ------
        TraceError
            If the function does what cannot be traced.
        KernelError
            If arguments are not arrays, numbers, or structures of them.
        """
        structure, named = self._flatten(arguments, keywords)
        if is_tracing() or any(isinstance(value, Value) for _, value in named):
            return self._become_part(structure, named)
        call = self._call(structure, named)
        return call.rebuild(_execute(call.graph, call.operands, self.name))

    def trace(self, *arguments: Any, **keywords: Any) -> Graph:
        """Return the graph for arguments of these types: arrays, numbers, or :class:`TensorType` in their place."""
        structure, named = self._flatten(arguments, keywords)
        return self._traced(structure, named).graph

    def prepare(self, *arguments: Any, **keywords: Any) -> Call:
        """Return what a call with these arguments would compute, without computing it."""
        return self._call(*self._flatten(arguments, keywords))

    def derived(self, name: str, derive: Callable[[Traced], Traced]) -> Kernel:
        """Return a kernel of the same arguments, whose graphs ``derive`` makes of this one's."""
        return Kernel(self.function, name=name, static=tuple(self.static), _derive=(*self._derive, derive))

    # --- Arguments --------------------------------------------------------------------------------

    def _flatten(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Structure, list[Any]]:
        """Return the structure of the arguments, and their arrays with their paths."""
        try:
            bound = self.signature.bind(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"kernel {self.name}{self.signature}: {error}") from error
        bound.apply_defaults()
        named: list[tuple[str, Any]] = []
        parts = [
            static_structure(value, name) if name in self.static else flatten(value, name, named)
            for name, value in bound.arguments.items()
        ]
        return Structure(dict, tuple(bound.arguments), tuple(parts)), named

    def _call(self, structure: Structure, named: list[Any]) -> Call:
        traced = self._traced(structure, named)
        pairs = zip(named, traced.graph.inputs, strict=True)
        return Call(traced, tuple(_operand(path, value, wanted) for (path, value), wanted in pairs))

    def _become_part(self, structure: Structure, named: list[Any]) -> Any:
        """Add this kernel's graph to the one that is being traced."""
        outer = owner([value for _, value in named])
        traced = self._traced(structure, named)
        pairs = zip(named, traced.graph.inputs, strict=True)
        operands = [outer.builder.cast(as_number(outer, value), wanted.dtype) for (_, value), wanted in pairs]
        numbers = outer.builder.inline(traced.graph, operands)
        return traced.results.build(outer.value(numbers[output]) for output in traced.graph.outputs)

    # --- Traces -----------------------------------------------------------------------------------

    def _traced(self, structure: Structure, named: list[Any]) -> Traced:
        leaves = tuple(_leaf(path, value) for path, value in named)
        key = (structure, leaves)
        with self._lock:
            known = self._traces.get(key)
            if known is not None:
                self._traces.move_to_end(key)
                return known
        # Not under the lock: the function may call this kernel, and others may be called meanwhile.
        traced = self._trace(structure, leaves, tuple(path for path, _ in named))
        for derive in self._derive:
            traced = derive(traced)
        with self._lock:
            traced = self._traces.setdefault(key, traced)
            while len(self._traces) > limits.KERNEL_TRACES_MAX_COUNT:
                self._traces.popitem(last=False)
        return traced

    def _trace(self, structure: Structure, leaves: Sequence[Leaf], paths: tuple[str, ...]) -> Traced:
        try:
            trace = Trace(self.name, [leaf.type for leaf in leaves], Tracer)
            values = [trace.value(number, weak=leaf.is_weak) for number, leaf in enumerate(leaves)]
            with tracing(trace):
                bound = BoundArguments(self.signature, OrderedDict(structure.build(iter(values))))
                result = self.function(*bound.args, **bound.kwargs)
                results, outputs = self._outputs(trace, result)
            graph = trace.builder.finish(outputs)
        except TraceError:
            raise
        except KernelError as error:
            raise located(error, self._place) from error
        weak = [number for number, leaf in enumerate(leaves) if leaf.is_weak and number not in trace.pinned]
        return Traced(_with_decided(graph, weak), structure, paths, results)

    def _outputs(self, trace: Trace, result: Any) -> tuple[Structure, list[int]]:
        """Return the structure of what the function returned, and the nodes in it."""
        found: list[tuple[str, Any]] = []
        structure = flatten(result, "the result", found, sort_keys=False)
        numbers = []
        for path, value in found:
            is_foreign = isinstance(value, Value) and value._trace is not trace
            if is_foreign or not isinstance(value, (Value, bool, int, float, np.generic)):
                what = "of another trace" if is_foreign else f"of type {type(value).__name__}"
                raise TraceError(
                    f"{self._place}{path} of kernel {self.name!r} is {what}; return what was computed of the "
                    f"arguments, or plain numbers"
                )
            numbers.append(as_number(trace, value))
        return structure, numbers

    @property
    def _place(self) -> str:
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        return "" if code is None else f"{code.co_filename}:{code.co_firstlineno}: "


@overload
def kernel(function: Callable[..., Any], *, name: str | None = None, static: Sequence[str] = ()) -> Kernel: ...
@overload
def kernel(
    function: None = None, *, name: str | None = None, static: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Kernel]: ...
def kernel(
    function: Callable[..., Any] | None = None, *, name: str | None = None, static: Sequence[str] = ()
) -> Kernel | Callable[[Callable[..., Any]], Kernel]:
    """Make a kernel of a function over arrays: ``@sparkle.kernel``, or ``@sparkle.kernel(static=("axis",))``.

    Parameters
    ----------
    function
        Takes arrays, numbers, and lists, tuples and dicts of them; returns such a structure of what it computed. It may
        use operators, NumPy's functions, slices, and those of ``x.__array_namespace__()``.
    name
        For messages; the function's by default.
    static
        The names of arguments that the function needs to know (axes, counts, flags). None, strings, types and dtypes
        always are; ``axis: Static[int]`` says the same. Each value is traced on its own.

    Returns
    -------
    Kernel
        To be called as the function is.
    """
    if function is None:
        return lambda function: Kernel(function, name=name, static=static)
    return Kernel(function, name=name, static=static)


def as_kernel(function: Kernel | Callable[..., Any]) -> Kernel:
    """Return ``function`` as a kernel, if it is none."""
    return function if isinstance(function, Kernel) else Kernel(function)


def _annotated(function: Callable[..., Any]) -> set[str]:
    """Return the names of the arguments that are annotated as static."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):
        # Names that only type checkers import, or no function of Python's: nothing is annotated that could be read.
        return set()
    return {name for name, hint in hints.items() if _Static in getattr(hint, "__metadata__", ())}


def _leaf(path: str, value: Any) -> Leaf:
    """Return the type of an operand."""
    if isinstance(value, Value):
        return Leaf(TensorType(value.shape, value.dtype.name), value._weak)
    if type(value) in _WEAK:
        return Leaf(TensorType((), _WEAK[type(value)]), True)
    if isinstance(value, TensorType):
        check_type(value)
        return Leaf(value)
    if isinstance(value, np.ma.MaskedArray):
        raise KernelError(f"{path} is a masked array, whose mask kernels would not see; pass data and mask apart")
    if not (hasattr(value, "shape") and hasattr(value, "dtype")) and hasattr(value, "__array__"):
        value = np.asarray(value)
    try:
        return _array_leaf(tuple(value.shape), value.dtype)
    except (AttributeError, TypeError) as error:
        raise KernelError(
            f"{path} is of type {type(value).__name__}, not an array or a number; name it in static=(…) if the kernel "
            f"needs to know it"
        ) from error
    except KernelError as error:
        raise KernelError(f"{path}: {error}") from error


@lru_cache(limits.KERNEL_OPERAND_TYPES_MAX_COUNT)
def _array_leaf(shape: tuple[int, ...], dtype: Any) -> Leaf:
    found = TensorType(tuple(map(int, shape)), as_dtype(dtype))
    check_type(found)
    return Leaf(found)


def _operand(path: str, value: Any, wanted: TensorType) -> Any:
    """Return ``value`` as it is handed on to be computed with."""
    if isinstance(value, TensorType):
        raise KernelError(f"{path} is a type, {value}; give an array of it")
    if type(value) in _WEAK:
        try:
            return np.asarray(value, wanted.dtype)
        except OverflowError as error:
            raise KernelError(f"{path} is {value}, which is out of bounds for {wanted.dtype}") from error
    if isinstance(value, (np.ndarray, np.generic)):
        # In the machine's order of bytes.
        return np.asarray(value, wanted.dtype)
    return value if hasattr(value, "shape") and hasattr(value, "dtype") else np.asarray(value, wanted.dtype)


def _with_decided(graph: Graph, weak: Sequence[int]) -> Graph:
    """Return ``graph`` with plain numbers in the dtypes that they are combined in, where each is in one.

    A learning rate beside float32 is float32 already when it is handed over: the bits are those of NumPy, and devices
    without 64-bit floats have nothing to convert.
    """
    uses: dict[int, set[str]] = {number: set() for number in weak}
    for number in graph.outputs:
        uses.pop(number, None)
    for node in graph.nodes:
        for operand in node.operands:
            if operand in uses:
                uses[operand].add(node.dtype if node.op == "cast" else "")
    decided: dict[int, str] = {}
    for number, dtypes in uses.items():
        (dtype,) = dtypes if len(dtypes) == 1 else ("",)
        if dtype in FLOATS or (dtype and dtype != "bool" and graph.nodes[number].dtype == "int64"):
            decided[number] = dtype
    if not decided:
        return graph
    builder = GraphBuilder(
        [TensorType(one.shape, decided.get(number, one.dtype)) for number, one in enumerate(graph.inputs)]
    )
    numbers = list(range(len(graph.inputs)))
    for node in graph.nodes[len(numbers) :]:
        operands = [numbers[operand] for operand in node.operands]
        is_done = node.op == "cast" and node.operands[0] in decided
        numbers.append(operands[0] if is_done else builder.copy(node, operands))
    return builder.finish([numbers[output] for output in graph.outputs])
