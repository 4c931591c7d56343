"""Sparkle: any set of computers as one training machine, with no server in the middle.

>>> import sparkle_mesh as sparkle
>>> with sparkle.join("my-run", min_peers=4) as mesh:  # doctest: +SKIP
...     mesh.all_reduce(gradients, op="mean")

Importing this is quick: what a name needs is loaded when the name is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparkle_mesh import errors as errors
    from sparkle_mesh.async_mesh import AsyncMesh as AsyncMesh
    from sparkle_mesh.async_mesh import open_mesh as open_mesh
    from sparkle_mesh.collectives.compression import Compression as Compression
    from sparkle_mesh.kernels.gradient import gradient as gradient
    from sparkle_mesh.kernels.gradient import value_and_gradient as value_and_gradient
    from sparkle_mesh.kernels.tracing import kernel as kernel
    from sparkle_mesh.membership.keys import MeshKey as MeshKey
    from sparkle_mesh.mesh import Mesh as Mesh
    from sparkle_mesh.mesh import join as join
    from sparkle_mesh.version import __version__ as __version__

__all__ = [
    "AsyncMesh",
    "Compression",
    "Mesh",
    "MeshKey",
    "__version__",
    "errors",
    "gradient",
    "join",
    "kernel",
    "open_mesh",
    "value_and_gradient",
]

_HOMES = {
    "AsyncMesh": "sparkle_mesh.async_mesh",
    "Compression": "sparkle_mesh.collectives.compression",
    "Mesh": "sparkle_mesh.mesh",
    "MeshKey": "sparkle_mesh.membership.keys",
    "__version__": "sparkle_mesh.version",
    "gradient": "sparkle_mesh.kernels.gradient",
    "join": "sparkle_mesh.mesh",
    "kernel": "sparkle_mesh.kernels.tracing",
    "open_mesh": "sparkle_mesh.async_mesh",
    "value_and_gradient": "sparkle_mesh.kernels.gradient",
}


class _CloneFinder:
    """Finds the folders of this package that lie beside it in a clone.

    An editable install maps them as well. Without one a clone's root that comes first on the path, as it does for
    ``python -m`` there, would hide an installed wheel and lack two of its folders.
    """

    clone = Path(__file__).resolve().parent.parent

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in ("sparkle_mesh.transport", "sparkle_mesh.collectives"):
            return None
        folder = cls.clone / name.rpartition(".")[2]
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


if not (Path(__file__).parent / "transport").is_dir():
    sys.meta_path.append(_CloneFinder)


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("sparkle_mesh.errors")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
