"""What cannot be traced fails when it is traced, with the line, the reason and what to do."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparkle_mesh import limits
from sparkle_mesh.errors import KernelError, TraceError
from sparkle_mesh.kernels.creation import zeros
from sparkle_mesh.kernels.tracing import kernel
from sparkle_mesh.kernels.values import Value, current_trace

KEPT: list[Any] = []
ARRAY = np.arange(3.0)


def assign(x: Any) -> Any:
    x[0] = 1
    return x


def delete(x: Any) -> Any:
    del x[0]
    return x


def branch(x: Any) -> Any:
    if x.sum() > 0:
        return x
    return -x


def into_an_array(x: Any) -> Any:
    there = np.zeros(3)
    there += x
    return there


def grown(x: Any) -> Any:
    x += np.ones_like(x)[None]
    return x


def narrowed(x: Any) -> Any:
    x = x.astype("int32")
    x += 0.5
    return x


CASES: dict[str, tuple[Any, str]] = {
    "if": (branch, r"not known until the kernel runs.*np\.where"),
    "and": (lambda x: (x > 0) and x, r"np\.logical_and"),
    "float": (lambda x: float(x[0]), r"float\(\) of a traced array"),
    "int": (lambda x: int(x[0]), r"int\(\) of a traced array"),
    "complex": (lambda x: complex(x[0]), r"complex\(\) of a traced array"),
    "range": (lambda x: range(x[0]), "an index or a count"),
    "in": (lambda x: 1 in x, "in of a traced array"),
    "item": (lambda x: x[0].item(), r"item\(\)"),
    "tolist": (lambda x: x.tolist(), r"tolist\(\)"),
    "mask": (lambda x: x[x > 0], r"a mask that is traced.*np\.where"),
    "traced index": (lambda x: x[x.astype(int)], "an index that is traced"),
    "traced slice": (lambda x: x[: x.astype(int).sum()], "a slice's end"),
    "list index": (lambda x: x[[0, 1]], "a list, an array or a bool"),
    "bool index": (lambda x: x[True], "a list, an array or a bool"),
    "float index": (lambda x: x[0.5], "with float"),
    "too many indices": (lambda x: x[0, 0], r"2 indices are too many for an array of shape \(3,\)"),
    "two ellipses": (lambda x: x[..., ...], "one '...' at most"),
    "out of bounds": (lambda x: x[3], "index 3 is out of bounds for axis 0 of 3"),
    "assignment": (assign, r"changes an array in place.*np\.where"),
    "deletion": (delete, "changes an array in place"),
    "out": (lambda x: np.add(x, 1, out=np.zeros(3)), r"numpy\.add into an array"),
    "into an array": (into_an_array, r"numpy\.add into an array"),
    "in place, grown": (grown, r"x of shape \(3,\) cannot hold the result of add, of shape \(1, 3\)"),
    "in place, narrowed": (narrowed, "x of int32 cannot hold the result of add, which is float64"),
    "asarray": (lambda x: np.asarray(x), "no elements yet"),
    "array": (lambda x: np.array([x, x]), r"no elements yet.*np\.stack"),
    "captured array": (lambda x: x + ARRAY, r"NumPy array of shape \(3,\).*pass it as an argument"),
    "captured complex": (lambda x: x + 1j, "1j is complex"),
    "captured complex of NumPy": (lambda x: x + np.complex64(1j), "complex64"),
    "captured string": (lambda x: x + "a", "str is not an operand"),
    "complex dtype": (lambda x: x.astype(complex), "complex128 is not one of"),
    "no dtype": (lambda x: x.astype("nonsense"), "no dtype"),
    "random": (lambda x: np.random.default_rng(0).permutation(x), "no elements yet|not part of kernels"),
    "argmax": (lambda x: np.argmax(x), r"numpy\.argmax is not part of kernels"),
    "svd": (lambda x: np.linalg.svd(x[None]), r"numpy\.linalg\.svd is not part of kernels"),
    "ufunc": (lambda x: np.cbrt(x), r"numpy\.cbrt is not part of kernels"),
    "ufunc's method": (lambda x: np.add.accumulate(x), r"numpy\.add\.accumulate is not part"),
    "ufunc's keyword": (lambda x: np.add(x, 1, dtype="float32"), r"numpy\.add\(dtype=…\)"),
    "function's keyword": (lambda x: np.sum(x, where=[True, True, False]), r"numpy\.sum: .*'where'.* axis, dtype"),
    "where alone": (lambda x: np.where(x > 0), "count is not known"),
    "shapes": (lambda x: x + np.zeros_like(x)[:2], r"shapes \(3,\), \(2,\)"),
    "dtypes": (lambda x: x << 1, "left_shift does not take"),
    "reshape": (lambda x: x.reshape(2, -1), r"3 elements of shape \(3,\) do not make \(2, -1\)"),
    "reshape to what it is not": (lambda x: x.reshape(2), "3 elements"),
    "axis": (lambda x: x.sum(axis=1), "axis 1 is out of bounds"),
    "axis twice": (lambda x: x.sum(axis=(0, 0)), "name one twice"),
    "squeeze": (lambda x: x.squeeze(0), "not of length 1"),
    "moveaxis": (lambda x: np.moveaxis(x[None], (0, 1), 0), "as many axes"),
    "transpose": (lambda x: x[None].transpose((0,)), "no order"),
    "joined numbers": (lambda x: np.concatenate([x.sum()]), "without dimensions"),
    "stack": (lambda x: np.stack([x, x[:2]]), "arrays of one shape"),
    "broadcast": (lambda x: np.broadcast_arrays(x, x[:2]), "do not fit"),
    "dot": (lambda x: np.dot(x, x.reshape(1, 3, 1)), "two dimensions at most"),
    "matmul": (lambda x: x @ x.reshape(1, 3), "matmul of shapes"),
    "matmul of a number": (lambda x: x @ 2, "no axis to sum over"),
    "matmul of integers": (lambda x: x.astype(int) @ x.astype(int), "cast them first"),
    "norm": (lambda x: np.linalg.norm(x, 1), "only the Euclidean"),
    "mean": (lambda x: x.mean(dtype=int), "a mean in int64"),
    "round": (lambda x: x.round(2), "2 decimals"),
    "tril": (lambda x: np.tril(x), "two dimensions at least"),
    "empty maximum": (lambda x: x[:0].max(), "over no element"),
    "returned array": (lambda x: ARRAY, "the result of kernel '<lambda>' is of type ndarray"),
    "returned object": (lambda x: {"a": object()}, r"the result\['a'\] of kernel '<lambda>' is of type object"),
    "returned keys": (lambda x: {1: x}, "keys that are not strings"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_fails_where_it_is_written(name):
    function, message = CASES[name]
    with pytest.raises(TraceError, match=message) as caught:
        kernel(function)(np.arange(3.0))
    place, line, _ = str(caught.value).split(":", 2)
    assert place == __file__
    lines, first = inspect.getsourcelines(function)
    assert first <= int(line) < first + len(lines)


def test_the_line_is_that_of_the_statement():
    with pytest.raises(TraceError) as caught:
        kernel(branch)(ARRAY)
    line = int(str(caught.value).split(":")[1])
    assert Path(__file__).read_text(encoding="utf-8").splitlines()[line - 1].strip() == "if x.sum() > 0:"


def test_builder_errors_have_a_line_too():
    def wrong(x: Any) -> Any:
        y = x * 2
        return y @ y.reshape(1, 3)  # here

    with pytest.raises(TraceError, match="matmul of shapes") as caught:
        kernel(wrong)(ARRAY)
    line = int(str(caught.value).split(":")[1])
    assert Path(__file__).read_text(encoding="utf-8").splitlines()[line - 1].endswith("# here")
    assert isinstance(caught.value.__cause__, KernelError)


def test_values_that_leak_are_refused():
    KEPT.clear()
    keep = kernel(lambda x: KEPT.append(x) or x)
    keep.trace(ARRAY)
    message = "a value of the trace of kernel '<lambda>' is used outside of it"
    with pytest.raises(TraceError, match=message):
        kernel(lambda x: x + KEPT[0])(ARRAY)
    with pytest.raises(TraceError, match=message):
        kernel(lambda x: KEPT[0][1:] + x)(ARRAY)
    with pytest.raises(TraceError, match="of another trace"):
        kernel(lambda x: KEPT[0])(ARRAY)
    with pytest.raises(TraceError, match=message):
        KEPT[0] + 1
    with pytest.raises(TraceError, match=message):
        keep(KEPT[0])
    # A kernel within does not see those around it but through its arguments.
    with pytest.raises(TraceError, match="kernel 'outer'"):
        kernel(lambda x: kernel(lambda y: x + y)(x), name="outer")(ARRAY)


def test_loops_are_unrolled_within_a_bound():
    total = kernel(lambda x: sum(row * place for place, row in enumerate(x)))
    short = np.arange(limits.KERNEL_UNROLL_MAX_COUNT * 2.0).reshape(-1, 2)
    np.testing.assert_array_equal(total(short), (short * np.arange(len(short))[:, None]).sum(axis=0))
    with pytest.raises(TraceError, match="a loop over 65 elements"):
        total(np.ones(limits.KERNEL_UNROLL_MAX_COUNT + 1))
    with pytest.raises(TypeError, match="unsized"):
        kernel(lambda x: len(x))(np.float64(1))


def test_kernels_have_a_bound():
    def long(x: Any) -> Any:
        for turn in range(limits.KERNEL_NODES_MAX_COUNT):
            x = x + turn
        return x

    with pytest.raises(TraceError, match=r"test_tracing_errors.*nodes at most"):
        kernel(long)(ARRAY)
    with pytest.raises(TraceError, match=r"test_tracing_errors.*1 to 64 values"):
        kernel(lambda x: [x] * (limits.KERNEL_OUTPUTS_MAX_COUNT + 1))(ARRAY)
    with pytest.raises(TraceError, match=r"test_tracing_errors.*1 to 64 values, not 0"):
        kernel(lambda x: None)(ARRAY)
    with pytest.raises(TraceError, match=r"test_tracing_errors.*64 operands at most"):
        kernel(lambda x: x[0])([ARRAY] * (limits.KERNEL_INPUTS_MAX_COUNT + 1))


def test_what_kernels_make_is_made_within_them():
    with pytest.raises(TraceError, match="no kernel is being traced here"):
        zeros((2,))
    with pytest.raises(TraceError):
        current_trace()


def test_errors_of_the_users_own_pass():
    def wrong(x: Any) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        kernel(wrong)(ARRAY)
    # The trace is over nevertheless.
    assert not isinstance(kernel(lambda x: x * 2)(ARRAY), Value)


def test_what_is_traced_can_be_looked_at():
    seen: list[str] = []

    def look(x: Any) -> Any:
        seen.append(repr(x))
        assert (x.shape, x.ndim, x.size, x.nbytes, x.itemsize) == ((2, 3), 2, 6, 24, 4)
        assert x.dtype == np.float32
        assert len(x) == np.shape(x)[0] == np.size(x, 0) == 2
        assert np.ndim(x) == 2
        assert np.size(x) == 6
        assert np.result_type(x, np.float64) == np.float64
        assert not np.iscomplexobj(x)
        assert np.isrealobj(x)
        with pytest.raises(TypeError):
            hash(x)
        return x.real

    kernel(look, name="look")(np.ones((2, 3), "float32"))
    assert seen == ["<traced float32[2, 3] in kernel 'look'>"]
