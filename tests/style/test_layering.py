"""Who may import what: arrows point down this table only."""

from __future__ import annotations

import pytest

LEAVES = (
    "sparkle_mesh.errors",
    "sparkle_mesh.limits",
    "sparkle_mesh.clock",
    "sparkle_mesh.version",
    "sparkle_mesh.wire",
    "sparkle_mesh.environment",
    "sparkle_mesh.files",
    "sparkle_mesh.broadcast",
    "sparkle_mesh.nurseries",
    "sparkle_mesh.portal",
    "sparkle_mesh.tcp_info",
)
# The interface, and messages over its streams.
FABRIC_INTERFACE = ("sparkle_mesh.fabric.interface", "sparkle_mesh.fabric.framing")
SERVICES = ("sparkle_mesh.discovery", "sparkle_mesh.capabilities", "sparkle_mesh.membership")
BELOW_THE_NODE = (
    *LEAVES,
    "sparkle_mesh.transport",
    "sparkle_mesh.collectives",
    "sparkle_mesh.devices",
    "sparkle_mesh.fabric",
    *SERVICES,
    "sparkle_mesh.status",
)
# The longest matching name decides; every module may import its own package.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    # The front door: it loads on demand what it names.
    "sparkle_mesh": (
        "sparkle_mesh.errors",
        "sparkle_mesh.version",
        "sparkle_mesh.async_mesh",
        "sparkle_mesh.collectives.compression",
        "sparkle_mesh.kernels.gradient",
        "sparkle_mesh.kernels.tracing",
        "sparkle_mesh.mesh",
        "sparkle_mesh.membership",
        "sparkle_mesh.context",
        "sparkle_mesh.devices",
        "sparkle_mesh.kernels",
    ),
    "sparkle_mesh.errors": (),
    "sparkle_mesh.limits": (),
    "sparkle_mesh.clock": (),
    "sparkle_mesh.version": (),
    "sparkle_mesh.wire": LEAVES,
    "sparkle_mesh.environment": LEAVES,
    "sparkle_mesh.files": LEAVES,
    "sparkle_mesh.broadcast": LEAVES,
    "sparkle_mesh.nurseries": LEAVES,
    "sparkle_mesh.portal": LEAVES,
    "sparkle_mesh.tcp_info": LEAVES,
    "sparkle_mesh.transport": (*LEAVES, *FABRIC_INTERFACE),
    "sparkle_mesh.collectives": (*LEAVES, "sparkle_mesh.transport"),
    "sparkle_mesh.devices": LEAVES,
    "sparkle_mesh.kernels": (*LEAVES, "sparkle_mesh.devices"),
    "sparkle_mesh.fabric": LEAVES,
    "sparkle_mesh.discovery": (*LEAVES, "sparkle_mesh.fabric"),
    "sparkle_mesh.capabilities": (
        *LEAVES,
        "sparkle_mesh.fabric",
        "sparkle_mesh.devices.detect",
        "sparkle_mesh.discovery.routing_table",
        "sparkle_mesh.discovery.lookup",
        "sparkle_mesh.discovery.lookup_run",
    ),
    "sparkle_mesh.membership": (*LEAVES, "sparkle_mesh.fabric"),
    # What packages that bring devices may use.
    "sparkle_mesh.backends": (*LEAVES, "sparkle_mesh.devices", "sparkle_mesh.kernels"),
    "sparkle_mesh.context": (*LEAVES, "sparkle_mesh.devices", "sparkle_mesh.kernels"),
    # What a node tells about itself: plain records.
    "sparkle_mesh.status": (*LEAVES, "sparkle_mesh.devices"),
    "sparkle_mesh.node": BELOW_THE_NODE,
    "sparkle_mesh.async_collectives": (*BELOW_THE_NODE, "sparkle_mesh.uneven"),
    # The collectives of a process through its views.
    "sparkle_mesh.view_follower": BELOW_THE_NODE,
    "sparkle_mesh.state_chunks": (*LEAVES, "sparkle_mesh.collectives"),
    "sparkle_mesh.synchronization": (*BELOW_THE_NODE, "sparkle_mesh.async_mesh", "sparkle_mesh.state_chunks"),
    "sparkle_mesh.mesh_life": (*BELOW_THE_NODE, "sparkle_mesh.node", "sparkle_mesh.view_follower"),
    "sparkle_mesh.async_mesh": (
        *BELOW_THE_NODE,
        "sparkle_mesh.node",
        "sparkle_mesh.mesh_life",
        "sparkle_mesh.async_collectives",
        "sparkle_mesh.synchronization",
    ),
    "sparkle_mesh.uneven": (*LEAVES, "sparkle_mesh.async_collectives"),
    "sparkle_mesh.mesh_collectives": (*BELOW_THE_NODE, "sparkle_mesh.async_mesh", "sparkle_mesh.uneven"),
    "sparkle_mesh.mesh": (
        *BELOW_THE_NODE,
        "sparkle_mesh.node",
        "sparkle_mesh.async_mesh",
        "sparkle_mesh.mesh_collectives",
        "sparkle_mesh.synchronization",
    ),
    "sparkle_mesh.cli": (*BELOW_THE_NODE, "sparkle_mesh.node", "sparkle_mesh.mesh"),
}
# Where a package of others may be imported, and nowhere else.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "libp2p": ("sparkle_mesh.fabric", "sparkle_mesh.transport.libp2p_stream"),
    "torch": (),
    "cupy": (
        "sparkle_mesh.devices.cupy_device",
        "sparkle_mesh.devices.cupy_products",
        "sparkle_mesh.collectives.cupy_arrays",
    ),
    "cupy_backends": ("sparkle_mesh.devices.cupy_products",),
    "pyopencl": ("sparkle_mesh.devices.opencl_device",),
    "jax": (),
    "sklearn": (),
    "matplotlib": (),
    "rich": (),
    "click": ("sparkle_mesh.cli",),
}
PUBLIC = ("sparkle_mesh", "sparkle_mesh.errors")
# Modules all of whose names are public.
OPEN = ("sparkle_mesh.errors", "sparkle_mesh.backends")
NOT_INSTALLED = ("simulations", "tests", "examples", "benchmarks")
BARE = ("transport", "collectives")


def is_under(name, package):
    return name == package or name.startswith(f"{package}.")


def row_of(module):
    """Return the row of the table that a module belongs to; None if there is none."""
    rows = [row for row in MAY_IMPORT if row == module or (row != "sparkle_mesh" and is_under(module, row))]
    return max(rows, key=len, default=None)


def layer_violations(module):
    row = row_of(module.name)
    if row is None:
        yield f"{module.name} has no row in the table of layers"
        return
    own = () if row == "sparkle_mesh" else (row,)
    for line, imported in module.imports():
        if not is_under(imported, "sparkle_mesh"):
            continue
        if imported == "sparkle_mesh" or not any(is_under(imported, allowed) for allowed in (*own, *MAY_IMPORT[row])):
            yield f"{module.name}:{line} imports {imported}, which is not below {row}"


def third_party_violations(module):
    for line, imported in module.imports():
        top = imported.split(".")[0]
        if top in ONLY_IN and not any(is_under(module.name, place) for place in ONLY_IN[top]):
            yield f"{module.name}:{line} imports {top}, which belongs in {' or '.join(ONLY_IN[top]) or 'no module yet'}"
        if top in NOT_INSTALLED:
            yield f"{module.name}:{line} imports {top}, which is not installed with the library"


def bare_import_violations(module):
    for line, imported in module.imports():
        if imported.split(".")[0] in BARE:
            yield f"{module.name}:{line} imports {imported}; its name is sparkle_mesh.{imported}"


def public_api_violations(module):
    for line, imported in module.imports():
        if is_under(imported, "sparkle_mesh") and not (
            imported in PUBLIC or any(is_under(imported, one) for one in OPEN) or is_public_name(imported)
        ):
            yield f"{module.name}:{line} imports {imported}, which users are not meant to"


def is_public_name(imported):
    import sparkle_mesh

    package, _, name = imported.rpartition(".")
    return package == "sparkle_mesh" and name in sparkle_mesh.__all__


def found(rule, modules):
    return [violation for module in modules for violation in rule(module)]


def assert_none(violations):
    assert not violations, "\n".join(violations)


def test_arrows_point_down(library):
    assert_none(found(layer_violations, library))


def test_others_packages_stay_where_they_are_adapted(library):
    assert_none(found(third_party_violations, library))


def test_nobody_imports_mapped_folders_by_bare_names(library, programs):
    assert_none(found(bare_import_violations, [*library, *programs]))


def test_examples_use_the_public_api_alone(programs):
    examples = [module for module in programs if is_under(module.name, "examples")]
    assert len(examples) >= 3
    assert_none(found(public_api_violations, examples))


def test_all_of_the_library_is_looked_at(library):
    names = {module.name for module in library}
    assert {"sparkle_mesh", "sparkle_mesh.limits", "sparkle_mesh.transport.link", "sparkle_mesh.collectives"} <= names
    assert {module.name for module in library if row_of(module.name) is None} == set()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sparkle_mesh.limits", "from sparkle_mesh import errors"),
        ("sparkle_mesh.limits", "import sparkle_mesh.errors"),
        ("sparkle_mesh.wire", "import sparkle_mesh"),
        ("sparkle_mesh.transport.tcp", "from sparkle_mesh.collectives import ring"),
        ("sparkle_mesh.transport.tcp", "from sparkle_mesh.fabric import libp2p_fabric"),
        ("sparkle_mesh.collectives.ring", "def f():\n    from sparkle_mesh.membership.view import View"),
        ("sparkle_mesh.fabric.streams", "from ..membership import view"),
        ("sparkle_mesh.membership.service", "from importlib import import_module\nimport_module('sparkle_mesh.mesh')"),
        ("sparkle_mesh.discovery.service", "from sparkle_mesh.membership import keys"),
        ("sparkle_mesh.node", "from sparkle_mesh.mesh import join"),
        ("sparkle_mesh.mesh", "from sparkle_mesh.cli import node"),
        ("sparkle_mesh.brand_new", ""),
    ],
)
def test_arrow_upwards_is_found(parse_module, name, text):
    assert len(list(layer_violations(parse_module(name, text)))) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "sparkle_mesh.transport.tcp",
            "from sparkle_mesh import limits\nfrom sparkle_mesh.fabric.interface import Fabric",
        ),
        ("sparkle_mesh.transport.tcp", "from .link import Link\nfrom sparkle_mesh.transport.link import Link"),
        ("sparkle_mesh.mesh", "from sparkle_mesh.node import MeshNode\nimport numpy"),
    ],
)
def test_arrow_downwards_is_fine(parse_module, name, text):
    assert list(layer_violations(parse_module(name, text))) == []


def test_misplaced_package_is_found(parse_module):
    assert list(third_party_violations(parse_module("sparkle_mesh.node", "def f():\n    import libp2p.host")))
    assert list(third_party_violations(parse_module("sparkle_mesh.devices.cuda", "from torch import cuda")))
    assert list(third_party_violations(parse_module("sparkle_mesh.mesh", "from simulations import formation")))
    assert not list(third_party_violations(parse_module("sparkle_mesh.fabric.host", "import libp2p")))


def test_bare_import_is_found(parse_module):
    assert list(bare_import_violations(parse_module("tests.x", "from transport.link import Link")))
    assert list(bare_import_violations(parse_module("tests.x", "import collectives")))
    assert not list(bare_import_violations(parse_module("tests.x", "from sparkle_mesh.transport import link")))


def test_private_import_in_an_example_is_found(parse_module):
    assert list(public_api_violations(parse_module("examples.x", "from sparkle_mesh.mesh import join")))
    assert not list(public_api_violations(parse_module("examples.x", "import sparkle_mesh as sparkle")))
    assert not list(public_api_violations(parse_module("examples.x", "from sparkle_mesh.errors import UsageError")))
    assert not list(public_api_violations(parse_module("examples.x", "from sparkle_mesh import join")))
