"""``train_digits.py``: its arithmetic, and real processes that train together."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from sparkle_mesh import MeshKey

TRAINER = "examples/train_digits.py"


def test_gradients_are_those_of_the_loss(load_example):
    example = load_example("train_digits")
    random = np.random.default_rng(1)
    weights = {name: value.astype(np.float64) for name, value in example.initial_weights(random).items()}
    images, labels = random.random((7, 64)), random.integers(0, 10, 7)
    _, gradients = example.loss_and_gradients(weights, images, labels)
    for name, value in weights.items():
        direction = random.standard_normal(value.shape)
        step = 1e-6
        ahead, _ = example.loss_and_gradients(weights | {name: value + step * direction}, images, labels)
        behind, _ = example.loss_and_gradients(weights | {name: value - step * direction}, images, labels)
        assert np.vdot(gradients[name], direction) == pytest.approx((ahead - behind) / (2 * step), rel=1e-4), name


def test_ranks_split_the_data_and_share_the_test_set(load_example):
    train_images, train_labels, test_images, test_labels = load_example("train_digits").load_data(seed=3)
    assert train_images.dtype == np.float32
    assert len(train_images) == len(train_labels) == 1438
    assert len(test_images) == len(test_labels) == 359
    assert not {image.tobytes() for image in train_images} & {image.tobytes() for image in test_images}


def test_hash_sees_every_bit(load_example):
    example = load_example("train_digits")
    weights = example.initial_weights(np.random.default_rng(0))
    changed = {name: value.copy() for name, value in weights.items()}
    assert example.hash_weights(changed) == example.hash_weights(weights)
    changed["b2"].view(np.uint32)[3] ^= 1
    assert example.hash_weights(changed) != example.hash_weights(weights)


def test_processes_end_with_one_model(processes, mesh_name, tmp_path):
    reports = [tmp_path / f"{number}.json" for number in range(3)]
    common = [TRAINER, "--mesh", mesh_name, "--min-peers", "3", "--steps", "150", "--seed", "5"]
    commands = [[*common, "--report", report] for report in reports]
    commands[0].append("--json")
    ended = processes.run_together(commands)
    assert [one.code for one in ended] == [0, 0, 0], [one.err for one in ended]
    results = sorted((json.loads(report.read_text()) for report in reports), key=lambda result: result["rank"])
    assert [(result["rank"], result["size"], result["steps"]) for result in results] == [(r, 3, 150) for r in range(3)]
    assert len({result["weights_sha256"] for result in results}) == 1
    assert all(result["accuracy"] >= 0.93 for result in results)
    assert all(len(result["losses"]) == 150 for result in results)
    # The gradients of 150 steps were reduced: over shared memory, or over links, both ways.
    assert all(result["bytes_reduced"] == 150 * 4 * 7210 for result in results)
    assert all(
        result["algorithm"] == "shared" or min(result["bytes_sent"], result["bytes_received"]) > 150 * 4 * 7210
        for result in results
    )

    lines = [json.loads(line) for line in ended[0].out.splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 151, 10))
    assert set(lines[0]) == {"rank", "step", "steps", "loss", "accuracy", "step_ms", "bytes", "peers"}
    assert lines[-1]["peers"] >= 2
    assert ended[1].out.startswith("rank ")
    assert "accuracy" in ended[1].err


def test_last_step_waits_for_a_late_one(processes, mesh_name, tmp_path):
    """The twenty milliseconds that are left when one dies are over long before another has started."""
    # Three: of two, the second may not go on when the first dies.
    common = [TRAINER, "--mesh", mesh_name, "--min-peers", "3", "--steps", "30", "--step-ms", "1", "--json"]
    commands = [[*common, "--end-together", "--report", tmp_path / f"{number}.json"] for number in range(4)]
    *others, victim = [processes.start(*command) for command in commands[:3]]
    assert victim.stdout.readline()
    victim.kill()
    for process in (*others, processes.start(*commands[3])):
        _, err = process.communicate(timeout=processes.TIMEOUT_S)
        assert process.returncode == 0, err
    *stayed, came = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1, 3))
    assert {one["weights_sha256"] for one in stayed} == {came["weights_sha256"]}
    assert [one["size"] for one in (*stayed, came)] == [3, 3, 3]
    assert [len(one["losses"]) for one in (*stayed, came)] == [30, 30, 1]
    assert came["first_step"] == 29


def test_key_file_admits(processes, mesh_name, tmp_path):
    key_file = tmp_path / "mesh.key"
    MeshKey.generate().save(key_file)
    command = [TRAINER, "--mesh", mesh_name, "--key-file", key_file, "--epochs", "1"]
    ended = processes.run_together([command, command])
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert "after 23 steps" in ended[0].err


def test_alone_it_says_what_it_waited_for(processes, mesh_name):
    ended = processes.run(TRAINER, "--mesh", mesh_name, "--timeout", "1")
    assert ended.code == 1
    assert mesh_name in ended.err
    assert "min_peers" in ended.err
    assert "Traceback" not in ended.err


def test_missing_key_file_is_one_line(load_example, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [TRAINER, "--key-file", str(tmp_path / "none.key")])
    with pytest.raises(SystemExit, match=r"^train_digits\.py: key file .*none\.key does not exist; make one with .*`$"):
        load_example("train_digits").main()


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--epochs", "-1"], ["--min-peers", "many"]])
def test_wrong_numbers_are_refused(load_example, monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", [TRAINER, *arguments])
    with pytest.raises(SystemExit) as ended:
        load_example("train_digits").parse_options()
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
