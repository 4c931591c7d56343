"""Generated kernels: each elementwise operation as an expression in C, with the meaning that NumPy gives it.

Operands are names of variables, so that an expression can have them twice. Integers are computed without signs, where
C leaves it open what happens beyond their range; the bits are the same. Conversions of floats to integers that cannot
hold them have no defined result, as in NumPy; they are written such that a common one comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparkle_mesh.errors import KernelError
from sparkle_mesh.kernels.codegen import Code, is_integer, is_signed, itemsize, literal, memory_type, value_type
from sparkle_mesh.kernels.ops import FLOATS
from sparkle_mesh.kernels.program import Instruction

# NumPy's names of functions in C that C calls otherwise, or the same.
_FUNCTIONS = {
    **{name: name for name in ("floor", "ceil", "trunc", "rint", "sqrt", "exp", "exp2", "expm1", "log", "log1p")},
    **{name: name for name in ("log2", "log10", "sin", "cos", "tan", "sinh", "cosh", "tanh", "copysign", "hypot")},
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "tan2")},
    "absolute": "fabs",
    "power": "pow",
}
_COMPARISONS = {
    "equal": "==",
    "not_equal": "!=",
    "less": "<",
    "less_equal": "<=",
    "greater": ">",
    "greater_equal": ">=",
}
_BITWISE = {"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"}
_LOGICAL = {"logical_and": "&&", "logical_or": "||", "logical_xor": "!="}
# float16 results that need no rounding: they are one of the operands, or a whole number near one.
_EXACT = frozenset({"negative", "absolute", "sign", "floor", "ceil", "trunc", "rint", "maximum", "minimum"})
_EXACT |= {"copysign", "where", "copy"}


def expression(code: Code, one: Instruction, operands: Sequence[str], dtypes: Sequence[str]) -> str:
    """Return the value of an instruction.

    Parameters
    ----------
    operands
        Names of variables of their ``dtypes`` in registers.
    """
    if one.op == "cast":
        return cast(code, operands[0], dtypes[0], one.dtype)
    if one.op == "copy":
        return operands[0]
    if one.op == "constant":
        assert one.value is not None
        return literal(one.value, one.dtype)
    if one.op == "where":
        return f"({operands[0]} ? {operands[1]} : {operands[2]})"
    found = _operation(code, one.op, operands, dtypes, one.dtype)
    return rounded_half(found) if one.dtype == "float16" and one.op not in _EXACT else found


def rounded_half(value: str) -> str:
    """Return ``value`` rounded to float16, in registers."""
    return f"from_half(to_half({value}))"


def combine(code: Code, op: str, a: str, b: str, dtype: str) -> str:
    """Return ``a`` and ``b``, both of ``dtype`` in registers, as one value of a reduction."""
    name = {"sum": "add", "prod": "multiply", "max": "maximum", "min": "minimum"}[op]
    return _operation(code, name, (a, b), (dtype, dtype), dtype)


def cast(code: Code, x: str, source: str, target: str) -> str:
    """Return ``x`` converted as NumPy does it."""
    if source == target:
        return x
    if target == "bool":
        return f"((u8)({x} != 0))"
    if target == "float16":
        return rounded_half(f"{_odd(code)}({x})" if source == "float64" else f"((f32){x})")
    kind = memory_type(target)
    if source in FLOATS and is_integer(target):
        if target == "uint64":
            return f"({x} < 0 ? (u64)(i64){x} : (u64){x})"
        # Through a wider type: negative ones wrap around.
        wide = "i64" if target in ("uint32", "int64") else "i32"
        return f"(({kind})({wide}){x})"
    return f"(({kind}){x})"


def _odd(code: Code) -> str:
    """A float64 as a float32 that rounds to the same float16: what is cut off leaves its last bit odd."""
    return code.function(
        "round_to_odd",
        """f32 round_to_odd(f64 x) {
  const f32 near = (f32)x;
  const u32 bits = BITS_OF_F32(near);
  if ((f64)near == x || x != x || (bits & 1u)) return near;
  const f64 size = x < 0 ? -x : x, found = near < 0 ? -near : near;
  return F32_OF_BITS(size > found ? bits + 1u : bits - 1u);
}""",
    )


def _operation(code: Code, op: str, operands: Sequence[str], dtypes: Sequence[str], dtype: str) -> str:
    """Return the value before it is rounded to float16."""
    a, *rest = operands
    source = dtypes[0]
    if op in _COMPARISONS:
        return _comparison(_COMPARISONS[op], a, rest[0], source, dtypes[1])
    if op in _LOGICAL:
        return f"((u8)(({a} != 0) {_LOGICAL[op]} ({rest[0]} != 0)))"
    if op in _BITWISE:
        return f"(({memory_type(dtype)})({a} {_BITWISE[op]} {rest[0]}))"
    if op in _TESTS:
        return f"((u8)({_TESTS[op](a, source)}))"
    if op == "divide":
        kind = value_type(dtype)
        return f"(({kind}){a} / ({kind}){rest[0]})"
    table = _BOOLS if source == "bool" else _INTEGERS if is_integer(source) else _REALS
    made = table.get(op)
    if made is not None:
        return made(code, operands, source)
    if op not in _FUNCTIONS or source not in FLOATS:
        raise KernelError(f"generated kernels do not compute {op} of {source}")
    return f"{code.math(_FUNCTIONS[op], source)}({', '.join(operands)})"


def _comparison(sign: str, a: str, b: str, left: str, right: str) -> str:
    if left == right or not (is_integer(left) and is_integer(right)):
        return f"((u8)({a} {sign} {b}))"
    # A signed and an unsigned one: a negative number is less than any that has no sign.
    if is_signed(left):
        return f"((u8)({a} < 0 ? -1 {sign} 0 : (u64){a} {sign} (u64){b}))"
    return f"((u8)({b} < 0 ? 0 {sign} -1 : (u64){a} {sign} (u64){b}))"


_TESTS: dict[str, Callable[[str, str], str]] = {
    "logical_not": lambda x, dtype: f"{x} == 0",
    "isnan": lambda x, dtype: f"{x} != {x}",
    "isinf": lambda x, dtype: f"{_magnitude(x)} == {_infinity(dtype)}" if dtype in FLOATS else "0",
    "isfinite": lambda x, dtype: f"{_magnitude(x)} < {_infinity(dtype)}" if dtype in FLOATS else "1",
    "signbit": lambda x, dtype: f"BITS_OF_F64({x}) >> 63" if dtype == "float64" else f"BITS_OF_F32({x}) >> 31",
}


def _magnitude(x: str) -> str:
    return f"({x} < 0 ? -{x} : {x})"


def _infinity(dtype: str) -> str:
    return literal(float("inf"), dtype)


def _wide(dtype: str) -> str:
    """Return the unsigned type that integers are computed with."""
    return "u64" if itemsize(dtype) == 8 else "u32"


def _wrapped(sign: str) -> Callable[[Code, Sequence[str], str], str]:
    def made(code: Code, operands: Sequence[str], dtype: str) -> str:
        wide = _wide(dtype)
        return f"(({memory_type(dtype)})(({wide}){operands[0]} {sign} ({wide}){operands[1]}))"

    return made


def _infix(sign: str) -> Callable[[Code, Sequence[str], str], str]:
    return lambda code, operands, dtype: f"({operands[0]} {sign} {operands[1]})"


def _unchanged(code: Code, operands: Sequence[str], dtype: str) -> str:
    return operands[0]


def _larger(code: Code, operands: Sequence[str], dtype: str) -> str:
    return _chosen(code, ">", operands, dtype)


def _smaller(code: Code, operands: Sequence[str], dtype: str) -> str:
    return _chosen(code, "<", operands, dtype)


def _chosen(code: Code, sign: str, operands: Sequence[str], dtype: str) -> str:
    a, b = operands
    if dtype not in FLOATS:
        return f"({a} {sign}= {b} ? {a} : {b})"
    if code.language != "c":
        # NaN, from either side, stays.
        return f"({a} {sign}= {b} || {a} != {a} ? {a} : {b})"
    # Of zeros with different signs NumPy takes the second one, on an x86. In this form compilers make vectors of it.
    kind = value_type(dtype)
    name = f"{'larger' if sign == '>' else 'smaller'}_{kind}"
    text = f"{kind} {name}({kind} a, {kind} b) {{ const {kind} one = a {sign} b ? a : b; return a != a ? a : one; }}"
    return f"{code.function(name, text)}({a}, {b})"


# --- Integers -------------------------------------------------------------------------------------


def _integer_negative(code: Code, operands: Sequence[str], dtype: str) -> str:
    return f"(({memory_type(dtype)})(0 - ({_wide(dtype)}){operands[0]}))"


def _integer_absolute(code: Code, operands: Sequence[str], dtype: str) -> str:
    (a,) = operands
    return f"({a} < 0 ? {_integer_negative(code, operands, dtype)} : {a})" if is_signed(dtype) else a


def _integer_sign(code: Code, operands: Sequence[str], dtype: str) -> str:
    (a,) = operands
    return (
        f"(({memory_type(dtype)})(({a} > 0) - ({a} < 0)))" if is_signed(dtype) else f"(({memory_type(dtype)})({a} > 0))"
    )


def _integer_reciprocal(code: Code, operands: Sequence[str], dtype: str) -> str:
    (a,) = operands
    negative = f" : {a} == -1 ? -1" if is_signed(dtype) else ""
    return f"(({memory_type(dtype)})({a} == 1 ? 1{negative} : 0))"


def _integer_square(code: Code, operands: Sequence[str], dtype: str) -> str:
    return _wrapped("*")(code, (operands[0], operands[0]), dtype)


def _left_shift(code: Code, operands: Sequence[str], dtype: str) -> str:
    a, b = operands
    wide, bits = _wide(dtype), 8 * itemsize(dtype)
    return f"(({memory_type(dtype)})(({wide}){b} < {bits} ? ({wide}){a} << ({wide}){b} : 0))"


def _right_shift(code: Code, operands: Sequence[str], dtype: str) -> str:
    a, b = operands
    wide, bits = _wide(dtype), 8 * itemsize(dtype)
    beyond = f"({a} < 0 ? -1 : 0)" if is_signed(dtype) else "0"
    return f"(({memory_type(dtype)})(({wide}){b} < {bits} ? {a} >> ({wide}){b} : {beyond}))"


def _called(prefix: str, signed: str, unsigned: str) -> Callable[[Code, Sequence[str], str], str]:
    """Return what calls a function of two integers; T, U in its body are its type, and that without a sign."""

    def made(code: Code, operands: Sequence[str], dtype: str) -> str:
        kind = memory_type(dtype)
        body = (signed if is_signed(dtype) else unsigned).replace("T_", kind).replace("U_", _wide(dtype))
        name = code.function(f"{prefix}_{kind}", f"{kind} {prefix}_{kind}({kind} a, {kind} b) {{\n{body}\n}}")
        return f"{name}({', '.join(operands)})"

    return made


_INTEGERS: dict[str, Callable[[Code, Sequence[str], str], str]] = {
    "add": _wrapped("+"),
    "subtract": _wrapped("-"),
    "multiply": _wrapped("*"),
    "maximum": _larger,
    "minimum": _smaller,
    "negative": _integer_negative,
    "absolute": _integer_absolute,
    "sign": _integer_sign,
    "reciprocal": _integer_reciprocal,
    "square": _integer_square,
    "invert": lambda code, operands, dtype: f"(({memory_type(dtype)})~{operands[0]})",
    "left_shift": _left_shift,
    "right_shift": _right_shift,
    **dict.fromkeys(("floor", "ceil", "trunc", "rint"), _unchanged),
    "floor_divide": _called(
        "floor_divide",
        """  if (b == 0) return 0;
  if (b == -1) return (T_)(0 - (U_)a);
  return (T_)(a / b - (a % b != 0 && (a < 0) != (b < 0)));""",
        "  return b == 0 ? (T_)0 : (T_)(a / b);",
    ),
    "remainder": _called(
        "remainder",
        """  if (b == 0 || b == -1) return 0;
  const T_ rest = (T_)(a % b);
  return rest != 0 && (rest < 0) != (b < 0) ? (T_)(rest + b) : rest;""",
        "  return b == 0 ? (T_)0 : (T_)(a % b);",
    ),
    # To a negative power: what is left of the fraction.
    "power": _called(
        "power",
        """  if (b < 0) return a == 1 ? (T_)1 : a != -1 ? (T_)0 : b % 2 ? (T_)-1 : (T_)1;
  U_ result = 1, factor = (U_)a;
  for (U_ left = (U_)b; left; left >>= 1) {
    if (left & 1) result *= factor;
    factor *= factor;
  }
  return (T_)result;""",
        """  U_ result = 1, factor = (U_)a;
  for (U_ left = (U_)b; left; left >>= 1) {
    if (left & 1) result *= factor;
    factor *= factor;
  }
  return (T_)result;""",
    ),
}

_BOOLS: dict[str, Callable[[Code, Sequence[str], str], str]] = {
    **dict.fromkeys(("add", "maximum"), _infix("|")),
    **dict.fromkeys(("multiply", "minimum"), _infix("&")),
    **dict.fromkeys(("absolute", "floor", "ceil", "trunc", "rint", "square"), _unchanged),
    "invert": lambda code, operands, dtype: f"((u8)!{operands[0]})",
}


# --- Floats ---------------------------------------------------------------------------------------


def _float_sign(code: Code, operands: Sequence[str], dtype: str) -> str:
    (a,) = operands
    return f"({a} > 0 ? {literal(1.0, dtype)} : {a} < 0 ? {literal(-1.0, dtype)} : {a} == 0 ? 0 : {a})"


def _divided(prefix: str, zero: str, result: str) -> Callable[[Code, Sequence[str], str], str]:
    """Return what calls a division with a whole quotient, whose remainder has the divisor's sign, as Python's."""

    def made(code: Code, operands: Sequence[str], dtype: str) -> str:
        kind = value_type(dtype)
        text = f"""{kind} {prefix}_{kind}({kind} a, {kind} b) {{
  {kind} rest = {code.math("fmod", dtype)}(a, b);
  if (b == 0) return {zero};
  {kind} quotient = (a - rest) / b;
  if (rest != 0) {{
    if ((b < 0) != (rest < 0)) {{
      rest += b;
      quotient -= 1;
    }}
  }} else {{
    rest = {code.math("copysign", dtype)}(({kind})0, b);
  }}
  {result}
}}"""
        floor, half = code.math("floor", dtype), literal(0.5, dtype)
        text = text.replace("FLOOR_", floor).replace("HALF_", half)
        text = text.replace("SIGNED_ZERO_", f"{code.math('copysign', dtype)}(({kind})0, a / b)").replace("T_", kind)
        return f"{code.function(f'{prefix}_{kind}', text)}({', '.join(operands)})"

    return made


_REALS: dict[str, Callable[[Code, Sequence[str], str], str]] = {
    "add": _infix("+"),
    "subtract": _infix("-"),
    "multiply": _infix("*"),
    "maximum": _larger,
    "minimum": _smaller,
    "negative": lambda code, operands, dtype: f"(-{operands[0]})",
    "sign": _float_sign,
    "square": lambda code, operands, dtype: f"({operands[0]} * {operands[0]})",
    "reciprocal": lambda code, operands, dtype: f"({literal(1.0, dtype)} / {operands[0]})",
    "floor_divide": _divided(
        "floor_divide",
        "a / b",
        """if (quotient == 0) return SIGNED_ZERO_;
  const T_ whole = FLOOR_(quotient);
  return quotient - whole > HALF_ ? whole + 1 : whole;""",
    ),
    "remainder": _divided("remainder", "rest", "return rest;"),
}
