"""The example of a package with a backend: found by its entry point, as if it were installed, and of use."""

from __future__ import annotations

import importlib
import shutil
import sys
import tomllib
from importlib import metadata

import numpy as np
import pytest

from sparkle_mesh.context import Context
from sparkle_mesh.devices.device import Device
from sparkle_mesh.devices.registry import ENTRY_POINT_GROUP, Registry
from sparkle_mesh.errors import KernelStoppedError, OutOfMemoryError
from sparkle_mesh.kernels.gradient import value_and_gradient
from sparkle_mesh.kernels.runners import RunsPrograms
from sparkle_mesh.kernels.tracing import kernel


@pytest.fixture
def site(root, tmp_path, monkeypatch):
    """Install the package into a folder on the path, as pip would: its modules, and what tells of its entry points."""
    folder = tmp_path / "site"
    source = root / "examples" / "backend_example"
    shutil.copytree(source / "sparkle_mirror", folder / "sparkle_mirror", ignore=shutil.ignore_patterns("__pycache__"))
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    told = folder / f"sparkle_mirror-{project['version']}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (told / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    before = {name for name in sys.modules if name.startswith("sparkle_mirror")}
    kept = {name: sys.modules.pop(name) for name in before}
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield folder
    for name in [name for name in sys.modules if name.startswith("sparkle_mirror")]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def context(site, tmp_path):
    with Context("mirror", data_dir=tmp_path) as found:
        yield found


@kernel
def everything(x, y, n):
    """Return something of each kind of step: elementwise work, reductions, products, copies."""
    product = (x @ y.T) * 0.5
    joined = np.concatenate([product, np.flip(product, axis=0)])
    return {
        "product": product,
        "joined": joined[::-2, 1:],
        "softmax": np.exp(product - product.max(axis=1, keepdims=True)),
        "parts": (np.where(x > 0, x, -x).sum(axis=0), (n // 3).max(), x.mean()),
        "counted": n + np.ones_like(n),
    }


def test_its_entry_point_is_found(site):
    (point,) = (one for one in metadata.entry_points(group=ENTRY_POINT_GROUP) if one.name == "mirror")
    registry = Registry(entry_points=lambda: [point])
    found = registry.devices("mirror")
    assert [str(device) for device in found] == ["mirror:0", "mirror:1"]
    assert all(isinstance(device, Device) and isinstance(device, RunsPrograms) for device in found)
    registry.close()


def test_kernels_run_on_it_as_on_the_cpu(context):
    random = np.random.default_rng(0)
    x, y = random.standard_normal((5, 7)), random.standard_normal((4, 7))
    n = random.integers(-50, 50, (3, 2))
    wanted, found = (context.run(everything, x, y, n, device=device) for device in ("cpu", "mirror:1"))
    assert list(found) == list(wanted)
    pairs = [(found[name], wanted[name]) for name in wanted if name != "parts"]
    pairs += zip(found["parts"], wanted["parts"], strict=True)
    for one, other in pairs:
        assert one.device == "mirror:1"
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one.to_numpy(), other.to_numpy(), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "uint64", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 5)])
def test_dtypes_and_shapes(context, dtype, shape):
    x = context.asarray(np.ones(shape, dtype), device="mirror")
    found = context.run(lambda x: (x.astype("float32") + 2).sum(), x, device="mirror")
    assert found.item() == 3.0 * np.ones(shape).size
    assert context.run(lambda x: x, x, device="mirror").to_numpy().dtype == dtype


def test_gradients_run_on_it(context):
    x = np.linspace(-1, 1, 7)
    value, slope = context.run(value_and_gradient(lambda x: (np.sin(x) ** 2).sum()), x, device="mirror")
    assert value.item() == pytest.approx((np.sin(x) ** 2).sum())
    np.testing.assert_allclose(slope.to_numpy(), np.sin(2 * x), atol=1e-12)


def test_arrays_go_from_one_to_the_other(context):
    array = context.array((300, 5), device="mirror:0").fill_random(seed=3)
    assert array.to_device("mirror:1").devices == ("mirror:0", "mirror:1")
    np.testing.assert_array_equal(array.to_numpy(), context.array((300, 5), device="cpu").fill_random(3).to_numpy())


def test_it_shares_kernels_with_others(context):
    x = np.random.default_rng(1).standard_normal((640, 10))
    found = context.run(lambda x: np.tanh(x).sum(axis=1), x, device=["cpu", "mirror:0", "mirror:1"])
    np.testing.assert_allclose(found.to_numpy(), np.tanh(x).sum(axis=1), rtol=1e-12)


def test_it_says_when_it_is_full_and_stops_when_it_is_told(context):
    with pytest.raises(OutOfMemoryError, match="mirror:0"):
        context.array((1 << 28,), device="mirror")
    asked = iter([False, True])
    with pytest.raises(KernelStoppedError):
        context.run(lambda x: x + 1, np.ones(3), device="mirror", should_stop=lambda: next(asked, True))
