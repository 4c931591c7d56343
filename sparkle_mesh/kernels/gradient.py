"""Gradients of kernels: graphs that compute them, by going through a graph backwards (reverse mode).

Each node's gradient is the sum over its users of what :mod:`.gradient_rules` says. The result is a graph like any
other, whose gradient can be taken again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from sparkle_mesh.errors import KernelError
from sparkle_mesh.kernels.gradient_rules import NOT_DIFFERENTIABLE, RULES, Place
from sparkle_mesh.kernels.graph import Graph, GraphBuilder
from sparkle_mesh.kernels.ops import FLOATS
from sparkle_mesh.kernels.structure import LEAF, Structure
from sparkle_mesh.kernels.tracing import Kernel, Traced, as_kernel

#: Which arguments: by position or by name, one or several.
Arguments: TypeAlias = int | str | Sequence[int | str]


def gradient_graph(graph: Graph, wrt: Sequence[int], *, output: int = 0, keep: Sequence[int] = ()) -> Graph:
    """Return a graph of the same inputs that computes gradients.

    Parameters
    ----------
    wrt
        The inputs, all floats, with respect to which.
    output
        The output, one float, of which.
    keep
        Outputs of ``graph`` that are outputs again.

    Returns
    -------
    Graph
        Its outputs are those of ``keep``, then a gradient for each of ``wrt``, of the input's shape and dtype.

    Raises
    ------
    KernelError
        If the output is not one float, an input is not of floats, or the graph would have too many nodes.
    """
    root = graph.outputs[output]
    result = graph.nodes[root].type
    if result.shape or result.dtype not in FLOATS:
        raise KernelError(f"gradients are of one float, and output {output} is {result}; take its sum or mean first")
    for number in wrt:
        if graph.inputs[number].dtype not in FLOATS:
            raise KernelError(f"gradients are with respect to floats, and input {number} is {graph.inputs[number]}")
    builder = GraphBuilder(graph.inputs)
    numbers = builder.inline(graph, range(len(graph.inputs)))
    reached = _reached(graph, wrt)
    # What flows back to each node that depends on an input of ``wrt``.
    gradients: dict[int, int] = {root: builder.constant(1.0, result.dtype)} if root in reached else {}
    for number in range(root, len(graph.inputs) - 1, -1):
        if number not in gradients:
            continue
        node = graph.nodes[number]
        operands = tuple(numbers[operand] for operand in node.operands)
        for position, operand in enumerate(node.operands):
            if operand in reached:
                place = Place(builder, node, operands, numbers[number], position)
                part = RULES[node.op](place, gradients[number])
                if part is not None:
                    known = gradients.get(operand)
                    gradients[operand] = part if known is None else builder.elementwise("add", known, part)
    outputs = [numbers[graph.outputs[one]] for one in keep]
    for number in wrt:
        found = gradients.get(number)
        if found is None:
            tensor = graph.inputs[number]
            found = builder.broadcast(builder.constant(0.0, tensor.dtype), tensor.shape)
        outputs.append(found)
    return builder.finish(outputs)


def _reached(graph: Graph, wrt: Sequence[int]) -> set[int]:
    """Return the nodes of floats that depend on inputs of ``wrt`` through floats alone."""
    reached = set(wrt)
    for number, node in enumerate(graph.nodes):
        if node.op not in NOT_DIFFERENTIABLE and node.dtype in FLOATS and not reached.isdisjoint(node.operands):
            reached.add(number)
    return reached


def gradient(kernel: Kernel | Callable[..., Any], argnums: Arguments = 0, *, has_aux: bool = False) -> Kernel:
    """Return a kernel that computes the gradient of ``kernel``, which returns one float.

    Parameters
    ----------
    kernel
        A kernel, or a function that is to be one.
    argnums
        The arguments with respect to which: a position or a name, or several of them. They are arrays of floats,
        or structures of them.
    has_aux
        Whether the kernel returns a pair, the float and something else that is handed back beside the gradient.

    Returns
    -------
    Kernel
        It takes the same arguments, and returns a gradient in the structure of the argument, or a tuple of them if
        ``argnums`` is several; with ``has_aux`` a pair of that and what else the kernel returns.

    Raises
    ------
    KernelError
        When it is made: if there are no such arguments. When it is called: if they are not floats, or the kernel
        returns anything but one float.

    Notes
    -----
    ``maximum``, ``minimum``, ``max`` and ``min`` share the gradient evenly at ties. ``gradient`` of what this returns
    computes second derivatives.
    """
    return _derivative(as_kernel(kernel), argnums, has_aux, with_value=False)


def value_and_gradient(kernel: Kernel | Callable[..., Any], argnums: Arguments = 0, *, has_aux: bool = False) -> Kernel:
    """Return a kernel that computes what ``kernel`` returns, and its gradient, in one go.

    As :func:`gradient`, but the result is a pair: what the kernel returns (with ``has_aux`` the pair of the float and
    what is beside it), and the gradient.
    """
    return _derivative(as_kernel(kernel), argnums, has_aux, with_value=True)


def _derivative(kernel: Kernel, argnums: Arguments, has_aux: bool, *, with_value: bool) -> Kernel:
    is_single = isinstance(argnums, (int, str))
    names = [_name(kernel, one) for one in ([argnums] if isinstance(argnums, (int, str)) else argnums)]
    if not names:
        raise KernelError(f"gradient of {kernel.name!r}: argnums names no argument")

    def derive(traced: Traced) -> Traced:
        results = _checked_results(traced, kernel.name, has_aux)
        chosen, structures = _chosen(traced, names, kernel.name)
        structure = structures[0] if is_single else Structure(tuple, (), tuple(structures))
        count = results.count
        keep = range(count) if with_value else range(1, count)
        graph = gradient_graph(traced.graph, chosen, keep=keep)
        if with_value:
            both = Structure(tuple, (), (results, structure))
            return Traced(graph, traced.arguments, traced.paths, both)
        if not has_aux:
            return Traced(graph, traced.arguments, traced.paths, structure)
        # What is kept comes first among the outputs, and second in what is returned.
        order = [*range(count - 1, len(graph.outputs)), *range(count - 1)]
        moved = Graph(graph.nodes, tuple(graph.outputs[place] for place in order))
        both = Structure(tuple, (), (structure, results.parts[1]))
        return Traced(moved, traced.arguments, traced.paths, both)

    return kernel.derived(f"{'value and ' if with_value else ''}gradient of {kernel.name}", derive)


def _name(kernel: Kernel, argument: int | str) -> str:
    """Return the name of an argument that is given by its position or name."""
    names = list(kernel.signature.parameters)
    if isinstance(argument, str):
        if argument in names:
            return argument
    elif -len(names) <= argument < len(names):
        return names[argument]
    raise KernelError(f"kernel {kernel.name!r} has no argument {argument!r} for argnums; it takes {', '.join(names)}")


def _checked_results(traced: Traced, name: str, has_aux: bool) -> Structure:
    """Return the structure of what a kernel returns, whose first array is the float."""
    results = traced.results
    if has_aux and (results.kind is not tuple or len(results.parts) != 2):
        raise KernelError(f"kernel {name!r} does not return a pair, of which has_aux=True tells")
    if (results.parts[0] if has_aux else results) != LEAF:
        raise KernelError(
            f"gradients are of one float, and kernel {name!r} returns a structure; with has_aux=True it may return a "
            f"pair of the float and anything else"
        )
    result = traced.graph.output_types[0]
    if result.shape or result.dtype not in FLOATS:
        raise KernelError(f"gradients are of one float, and kernel {name!r} returns {result}; take its sum or mean")
    return results


def _chosen(traced: Traced, names: Sequence[str], kernel: str) -> tuple[list[int], list[Structure]]:
    """Return the inputs that arguments are made of, and the structures of these."""
    first: dict[str, int] = {}
    count = 0
    for key, part in zip(traced.arguments.keys, traced.arguments.parts, strict=True):
        first[key] = count
        count += part.count
    chosen: list[int] = []
    structures: list[Structure] = []
    for name in names:
        part = traced.arguments.parts[traced.arguments.keys.index(name)]
        if not part.count:
            raise KernelError(
                f"argument {name!r} of kernel {kernel!r} has no arrays that gradients are with respect to"
            )
        places = range(first[name], first[name] + part.count)
        for number in places:
            tensor = traced.graph.inputs[number]
            if tensor.dtype not in FLOATS:
                raise KernelError(
                    f"{traced.paths[number]} of kernel {kernel!r} is {tensor}; gradients are with respect to floats: "
                    f"choose others with argnums, or convert it"
                )
        chosen += places
        structures.append(part)
    return chosen, structures
