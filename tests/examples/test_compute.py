"""The short programs that compute on devices."""

from __future__ import annotations

import re

import pytest

from sparkle_mesh.devices.registry import is_installed

MAX_LINES = 30


@pytest.mark.parametrize("name", ["compute_auto", "compute_explicit", "compute_shared"])
def test_it_is_short(root, name):
    assert len((root / "examples" / f"{name}.py").read_text().splitlines()) < MAX_LINES


def test_sparkle_decides_and_says_why(processes):
    ended = processes.run("examples/compute_auto.py")
    assert ended.code == 0, ended.err
    assert "kernel distances: float32[200000, 16], float32[16] -> float32[200000]\n-> " in ended.out
    assert re.search(r"<Array float32\[200000\] on .*>: from 0\.\d+ to [12]\.\d+\n$", ended.out)


@pytest.mark.parametrize("device", ["cpu", "opencl"])
def test_the_device_that_is_told_is_taken(processes, device):
    if device == "opencl" and not is_installed("pyopencl"):
        pytest.skip("needs an OpenCL device: PyOpenCL is not installed")
    ended = processes.run("examples/compute_explicit.py", device)
    assert ended.code == 0, ended.err
    assert f"<Array float32[512, 512] on {device}:0" in ended.out
    # The same random numbers everywhere.
    assert "c[0, 0] is 132.18" in ended.out
    assert re.search(r"expected: \d+\.\d+ ms", ended.out)


def test_a_device_that_is_not_there_is_one_line(processes):
    ended = processes.run("examples/compute_explicit.py", "tpu:3")
    assert ended.code == 1
    assert ended.err.startswith("there is no device 'tpu:3' here; there are cpu:0")
    assert "Traceback" not in ended.err


def test_devices_share_a_kernel(processes):
    ended = processes.run("examples/compute_shared.py")
    assert ended.code == 0, ended.err
    assert ended.out.endswith("all of it right: True\n")
    shares = [int(share) for share in re.findall(r"did (\d+)%", ended.out)]
    assert 99 <= sum(shares) <= 101
    assert len(shares) == 2 or not is_installed("pyopencl")


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("docs/compute.md", r"(?s)Device cpu:0.*<Array float64\[1024, 1024\] on .*kernel scaled: .*\nwhat "),
        ("README.md", r"(?s)kernel distances: float32\[200000, 16\].*\n1\.6\d+\n$"),
        ("examples/backend_example/README.md", "no device 'mirror:1' here"),
    ],
)
def test_the_introductions_run(processes, root, tmp_path, page, says):
    blocks = re.findall(r"^```python\n(.*?)^```$", (root / page).read_text(), re.MULTILINE | re.DOTALL)
    script = tmp_path / "introduction.py"
    script.write_text(next(block for block in blocks if "sparkle.init(" in block))
    ended = processes.run(script)
    # The last one needs its package.
    assert ended.code == ("mirror" in says), ended.err
    assert re.search(says, ended.out + ended.err), ended.out + ended.err
