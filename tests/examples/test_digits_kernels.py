"""``digits_kernels.py``: every backend learns the same."""

from __future__ import annotations

import argparse
import sys

import numpy as np
import pytest

from sparkle_mesh.context import Context
from sparkle_mesh.errors import UsageError

PROGRAM = "examples/digits_kernels.py"
ACCURACY_MIN = 0.95
# Between backends.
ACCURACY_DIFFERENCE_MAX = 0.01


def options(**changes):
    found = {"device": "cpu", "epochs": 6, "batch": 64, "rate": 0.1, "seed": 0, "quiet": True}
    return argparse.Namespace(**found | changes)


def trained(example, device, tmp_path):
    try:
        context = Context(device, data_dir=tmp_path)
    except UsageError:
        return None
    with context:
        return example.train(context, options(device=device))


def test_every_backend_comes_to_the_same_accuracy(load_example, tmp_path):
    example = load_example("digits_kernels")
    found = {device: trained(example, device, tmp_path) for device in ("cpu", "opencl", "cuda", "rocm")}
    reports = {device: report for device, report in found.items() if report is not None}
    assert "cpu" in reports
    for device, report in reports.items():
        assert report["device"] == f"{device}:0"
        assert report["accuracy"] > ACCURACY_MIN, device
        assert abs(report["accuracy"] - reports["cpu"]["accuracy"]) <= ACCURACY_DIFFERENCE_MAX, device
        np.testing.assert_allclose(report["losses"], reports["cpu"]["losses"], rtol=1e-2, err_msg=device)


def test_a_step_is_what_numpy_makes_of_it(load_example):
    example, other = load_example("digits_kernels"), load_example("train_digits")
    random = np.random.default_rng(3)
    weights = example.initial_weights(random)
    velocity = {name: np.zeros_like(value) for name, value in weights.items()}
    images, labels = random.random((7, 64), np.float32), random.integers(0, 10, 7)
    loss, after, _ = example.train_step(weights, velocity, images, np.eye(10, dtype=np.float32)[labels], 0.5)
    expected_loss, gradients = other.loss_and_gradients(weights, images, labels)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, value in weights.items():
        np.testing.assert_allclose(after[name], value - 0.5 * gradients[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_program_reports(processes, tmp_path):
    ended = processes.run(PROGRAM, "--device", "cpu", "--epochs", "2", "--report", tmp_path / "report.json")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].startswith("epoch  1/2  loss ")
    assert lines[1].startswith("epoch  2/2  loss ")
    assert lines[2].startswith("cpu:0: accuracy 9")
    assert '"accuracy": 0.9' in (tmp_path / "report.json").read_text()
    quiet = processes.run(PROGRAM, "--device", "cpu", "--epochs", "1", "--quiet")
    assert (quiet.code, len(quiet.out.splitlines())) == (0, 1)


def test_help_names_the_options(processes):
    ended = processes.run(PROGRAM, "--help")
    assert ended.code == 0
    assert all(option in ended.out for option in ("--device", "--epochs", "--batch", "--quiet", "--report"))


def test_a_device_that_is_not_there_is_one_line(load_example, monkeypatch):
    monkeypatch.setattr(sys, "argv", [PROGRAM, "--device", "tpu"])
    with pytest.raises(SystemExit, match=r"^digits_kernels\.py: there is no device 'tpu' here; there are cpu:0"):
        load_example("digits_kernels").main()


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--batch", "many"]])
def test_wrong_numbers_are_refused(load_example, monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", [PROGRAM, *arguments])
    with pytest.raises(SystemExit) as ended:
        load_example("digits_kernels").parse_options()
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
