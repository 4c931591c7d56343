"""Files that can be read in one sitting, bounds in one file, documentation on all that is public."""

from __future__ import annotations

import ast
import re
from types import FunctionType

import pytest

import sparkle_mesh

FILE_MAX_LINES = 500
FUNCTION_MAX_LINES = 80
LIMITS = "sparkle_mesh.limits"
# Conformance suites, which only tests run: their figures bound nothing that a user runs.
SUITES = {"sparkle_mesh.transport.testing", "sparkle_mesh.transport.link_checks"}
# What a constant is called that bounds something.
BOUND = re.compile(r"(^|_)(MAX|MIN|LIMIT|TIMEOUT|DEADLINE|INTERVAL|CAPACITY|BACKLOG)(_|$)")


def too_long(module):
    lines = module.text.count("\n")
    # The file of bounds is a list, and grows with what is bounded.
    if lines > FILE_MAX_LINES and module.name != LIMITS:
        yield f"{module.name} has {lines} lines, more than {FILE_MAX_LINES}"
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_MAX_LINES:
                yield f"{module.name}:{node.lineno} {node.name} has {length} lines, more than {FUNCTION_MAX_LINES}"


def stray_bounds(module):
    """Yield constants that bound something and stand elsewhere than in the file of bounds."""
    if module.name in {LIMITS, *SUITES}:
        return
    for node in module.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if not (isinstance(target, ast.Name) and target.id.isupper() and BOUND.search(target.id)):
                continue
            if node.value is not None and is_number(node.value):
                yield f"{module.name}:{node.lineno} {target.id} belongs in {LIMITS}"


def is_number(expression):
    """Return whether an expression is built of numbers alone (a reference to ``limits`` is not)."""
    if isinstance(expression, ast.BinOp):
        return is_number(expression.left) or is_number(expression.right)
    if isinstance(expression, ast.UnaryOp):
        return is_number(expression.operand)
    return isinstance(expression, ast.Constant) and isinstance(expression.value, (int, float))


def unitless_bounds(module):
    """Yield numbers in the file of bounds whose names do not tell their unit."""
    unit = re.compile(r"_(S|MS|BYTES|COUNT|CHARS|PORT|RECORDS|RATIO|BITS|PER_S|FACTOR|DEPTH|HOPS|PERCENT)(_|$)")
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and is_number(node.value):
            name = node.targets[0].id
            if not unit.search(name) and name not in {"KIB", "MIB", "GIB"}:
                yield f"{name} does not say its unit"


def undocumented(module):
    """Yield public modules, classes and functions without a docstring."""
    if module.tree.body and not ast.get_docstring(module.tree):
        yield f"{module.name} has no docstring"
    for owner, node in definitions(module.tree):
        if node.name.startswith("_") or ast.get_docstring(node) or any(is_exempt(mark) for mark in node.decorator_list):
            continue
        yield f"{module.name}:{node.lineno} {owner}{node.name} has no docstring"


def definitions(tree):
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield "", node


def is_exempt(decorator):
    return ast.unparse(decorator).split(".")[-1] == "overload"


@pytest.mark.parametrize("rule", [too_long, stray_bounds, undocumented])
def test_library_keeps_the_rule(library, rule):
    violations = [violation for module in library for violation in rule(module)]
    assert not violations, "\n".join(violations)


def test_bounds_say_their_unit(library):
    (limits,) = [module for module in library if module.name == LIMITS]
    assert list(unitless_bounds(limits)) == []


@pytest.mark.parametrize("name", sparkle_mesh.__all__)
def test_public_api_is_documented(name):
    value = getattr(sparkle_mesh, name)
    if name == "__version__":
        return
    assert (value.__doc__ or "").strip(), f"sparkle_mesh.{name} has no docstring"
    if isinstance(value, type):
        callables = (FunctionType, classmethod, staticmethod, property)
        methods = {attribute: method for attribute, method in vars(value).items() if isinstance(method, callables)}
        public = {attribute: method for attribute, method in methods.items() if not attribute.startswith("_")}
        bare = [f"{name}.{attribute}" for attribute, method in public.items() if not (method.__doc__ or "").strip()]
        assert bare == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (too_long, "x = 1\n" * (FILE_MAX_LINES + 1)),
        (too_long, "def f():\n" + "    x = 1\n" * FUNCTION_MAX_LINES),
        (stray_bounds, "_QUEUE_MAX_COUNT = 10"),
        (stray_bounds, "DIAL_TIMEOUT_S: Final = 10.0"),
        (stray_bounds, "MAX_BYTES = 4 * limits.MIB"),
        (unitless_bounds, "QUEUE_MAX = 10"),
        (undocumented, "x = 1"),
        (undocumented, "async def public():\n    pass"),
        (undocumented, '"""Doc."""\ndef public():\n    pass'),
        (undocumented, '"""Doc."""\nclass Public:\n    pass'),
    ],
)
def test_planted_violation_is_found(parse_module, rule, text):
    assert list(rule(parse_module("sparkle_mesh.planted", text)))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (stray_bounds, "_QUEUE = limits.QUEUE_MAX_COUNT\nKEY_BYTES = 32\nMAX_NAME = limits.NAME_MAX_CHARS"),
        (undocumented, '"""Doc."""\ndef _private():\n    pass'),
        (unitless_bounds, "QUEUE_MAX_COUNT = 10"),
    ],
)
def test_what_is_allowed_passes(parse_module, rule, text):
    assert not list(rule(parse_module("sparkle_mesh.planted", text)))
