"""What the library may not call, and where it may nonetheless."""

from __future__ import annotations

import ast

import pytest

# Dotted name (with all that is under it) -> the modules (with all that is under them) that may use it.
CLOCK = ("sparkle_mesh.clock",)
RESTRICTED: dict[str, tuple[str, ...]] = {
    "time.time": CLOCK,
    "time.time_ns": CLOCK,
    "time.monotonic": CLOCK,
    "time.monotonic_ns": CLOCK,
    "time.perf_counter": CLOCK,
    "time.perf_counter_ns": CLOCK,
    "datetime.datetime.now": CLOCK,
    "datetime.datetime.utcnow": CLOCK,
    # The client that asks a running node is plain blocking code: it polls, within a deadline, for one that is starting.
    "time.sleep": ("sparkle_mesh.cli.control",),
    "asyncio": (),
    "secrets": CLOCK,
    "os.urandom": CLOCK,
    # Only for the hardware's address, which is neither random nor the time.
    "uuid": ("sparkle_mesh.environment",),
    "os.environ": ("sparkle_mesh.environment", "sparkle_mesh.cli"),
    "os.getenv": ("sparkle_mesh.environment", "sparkle_mesh.cli"),
    "print": ("sparkle_mesh.cli",),
    # Bytes from elsewhere become code through these.
    "eval": (),
    "exec": (),
    "pickle": (),
    "cPickle": (),
    "cloudpickle": (),
    "dill": (),
    "marshal": (),
    "shelve": (),
    "joblib": (),
    "numpy.load": (),
    "os.system": (),
    "os.popen": (),
}
# A generator of its own, with a seed that was passed in, is as deterministic as its seed.
RANDOM_MODULES = ("random", "numpy.random")
RANDOM_ALLOWED = ("random.Random", "numpy.random.default_rng", "numpy.random.Generator", "numpy.random.SeedSequence")
# The places where any exception is caught, and why. Elsewhere `except BaseException` must end in a bare `raise`.
GUARDS: dict[tuple[str, str], str] = {
    ("sparkle_mesh.fabric.hubs", "run_guarded"): "the guard around a peer's handler: logs, counts, ends the stream",
    ("sparkle_mesh.fabric.guards", "translated"): "py-libp2p's exceptions have no common base; raises ours from them",
    ("sparkle_mesh.discovery.port_mapping", "map_by_upnp"): "miniupnpc raises the bare class; raises ours from it",
    ("sparkle_mesh.collectives.pending", "run"): "kept for whoever waits for the reduction; logged if nobody does",
    ("sparkle_mesh.kernels.pending", "_run"): "kept for whoever waits for the kernel",
    ("sparkle_mesh.portal", "task"): "hands on to the thread that waits for the call",
    ("sparkle_mesh.portal", "_run"): "hands on to the threads that wait; a thread has nobody else to tell",
}
BROAD = {"Exception", "BaseException"}
# Not failures, but the answer "not yet": what follows waits.
NOT_YET = {"BlockingIOError", "trio.WouldBlock"}


def is_under(name, package):
    return name == package or name.startswith(f"{package}.")


def restricted_uses(module):
    for line, used in {*module.uses(), *module.imports()}:
        for name, places in RESTRICTED.items():
            if is_under(used, name) and not any(is_under(module.name, place) for place in places):
                yield f"{module.name}:{line} uses {name}, which belongs in {' or '.join(places) or 'no module'}"


def random_uses(module):
    for line, used in set(module.uses()):
        if used in RANDOM_MODULES or not any(is_under(used, source) for source in RANDOM_MODULES):
            continue
        if not any(is_under(used, allowed) for allowed in RANDOM_ALLOWED):
            yield f"{module.name}:{line} uses {used}: draw from the clock's Entropy, or from a seeded generator"
    for line, imported in module.imports():
        if imported.startswith("random.") and imported not in RANDOM_ALLOWED:
            yield f"{module.name}:{line} imports {imported}: draw from the clock's Entropy, or from a seeded generator"


def is_broad(expression):
    if expression is None:
        return True
    kinds = expression.elts if isinstance(expression, ast.Tuple) else [expression]
    return any(ast.unparse(kind).removeprefix("builtins.") in BROAD for kind in kinds)


def ends_in_raise(body):
    return isinstance(body[-1], ast.Raise) and body[-1].exc is None


def catch_alls(module):
    """Yield catch-alls that neither raise again nor are guards."""

    def visit(node, function):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        catches = isinstance(node, ast.ExceptHandler) and is_broad(node.type) and not ends_in_raise(node.body)
        if catches and (module.name, function) not in GUARDS:
            yield f"{module.name}:{node.lineno} catches everything in {function or 'the module'}"
        suppresses = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress"
        if suppresses and any(is_broad(argument) for argument in node.args):
            yield f"{module.name}:{node.lineno} suppresses everything"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(module.tree, None)


def silent_passes(module):
    """Yield handlers that say nothing at all: a comment or ``contextlib.suppress`` tells that it is meant."""
    lines = module.text.splitlines()
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ExceptHandler) or (node.type and ast.unparse(node.type) in NOT_YET):
            continue
        passes = all(isinstance(step, ast.Pass) for step in node.body)
        if passes and "#" not in "".join(lines[node.lineno - 1 : node.end_lineno]):
            yield f"{module.name}:{node.lineno} passes in silence"


RULES = [restricted_uses, random_uses, catch_alls, silent_passes]


@pytest.mark.parametrize("rule", RULES)
def test_library_keeps_the_rule(library, rule):
    violations = [violation for module in library for violation in rule(module)]
    assert not violations, "\n".join(violations)


def test_guards_exist(library):
    # A guard that was moved or renamed must not leave a hole of its name.
    trees = {module.name: module.tree for module in library}
    for name, function in GUARDS:
        functions = [node for node in ast.walk(trees[name]) if getattr(node, "name", None) == function]
        handlers = [node for found in functions for node in ast.walk(found) if isinstance(node, ast.ExceptHandler)]
        assert any(is_broad(handler.type) for handler in handlers), (name, function)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (restricted_uses, "import time\nnow = time.time()"),
        (restricted_uses, "import time as t\nt.monotonic()"),
        (restricted_uses, "from time import monotonic\nmonotonic()"),
        (restricted_uses, "import time\nclock = time.perf_counter"),
        (restricted_uses, "from datetime import datetime\ndatetime.now()"),
        (restricted_uses, "from time import sleep"),
        (restricted_uses, "import secrets"),
        (restricted_uses, "import os\nos.urandom(4)"),
        (restricted_uses, "import os\nhome = os.environ['HOME']"),
        (restricted_uses, "from os import environ"),
        (restricted_uses, "import os\nos.getenv('HOME')"),
        (restricted_uses, "def f():\n    import pickle"),
        (restricted_uses, "eval('1')"),
        (restricted_uses, "exec('1')"),
        (restricted_uses, "print('hello')"),
        (restricted_uses, "import numpy as np\nnp.load('x')"),
        (random_uses, "import random\nrandom.random()"),
        (random_uses, "from random import choice"),
        (random_uses, "import numpy as np\nnp.random.rand(3)"),
        (catch_alls, "try:\n    f()\nexcept Exception:\n    log()"),
        (catch_alls, "try:\n    f()\nexcept:\n    log()"),
        (catch_alls, "try:\n    f()\nexcept (ValueError, BaseException):\n    log()"),
        (catch_alls, "try:\n    f()\nexcept Exception as error:\n    raise ValueError from error"),
        (catch_alls, "with contextlib.suppress(Exception):\n    f()"),
        (silent_passes, "try:\n    f()\nexcept ValueError:\n    pass"),
    ],
)
def test_planted_violation_is_found(parse_module, rule, text):
    assert list(rule(parse_module("sparkle_mesh.planted", text)))


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (restricted_uses, "sparkle_mesh.clock", "import time\ntime.monotonic()"),
        (restricted_uses, "sparkle_mesh.cli.node", "print('hello')"),
        (restricted_uses, "sparkle_mesh.planted", "self.time.time\nprinter = 1\ntrio.current_time()"),
        (random_uses, "sparkle_mesh.planted", "import random\nrandom.Random(3).random()"),
        (random_uses, "sparkle_mesh.planted", "import numpy as np\nnp.random.default_rng(3)"),
        (catch_alls, "sparkle_mesh.planted", "try:\n    f()\nexcept BaseException:\n    tidy()\n    raise"),
        (catch_alls, "sparkle_mesh.planted", "try:\n    f()\nexcept ValueError:\n    tidy()"),
        (silent_passes, "sparkle_mesh.planted", "try:\n    f()\nexcept ValueError:\n    pass  # gone already"),
        (silent_passes, "sparkle_mesh.planted", "try:\n    f()\nexcept BlockingIOError:\n    pass"),
    ],
)
def test_what_is_allowed_passes(parse_module, rule, name, text):
    assert not list(rule(parse_module(name, text)))
