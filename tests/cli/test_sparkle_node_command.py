"""``sparkle-node`` as a command: its answers, its errors in one line, its exit codes."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparkle_mesh import limits
from sparkle_mesh.cli import measuring
from sparkle_mesh.cli.commands import run_command_line
from sparkle_mesh.cli.control import SOCKET_NAME, run_dir
from sparkle_mesh.cli.lock import LOCK_NAME
from sparkle_mesh.cli.signals import StopSignals
from sparkle_mesh.devices.detect import detect_cpu
from sparkle_mesh.devices.kept_profiles import with_gflops
from sparkle_mesh.devices.registry import Registry
from sparkle_mesh.fabric.identity import Identity, load_or_create_identity
from sparkle_mesh.membership.invite import Invite
from sparkle_mesh.membership.keys import MeshKey

Start = Callable[..., Any]
Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(fake: ModuleType, data_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a command line in this process and returns exit code, stdout, stderr."""
    monkeypatch.setenv("SPARKLE_DATA_DIR", str(data_dir))

    def run(*arguments: str, launch: Any = None) -> tuple[int, str, str]:
        stop = StopSignals()
        stop.listen()
        code = run_command_line(arguments, stop, launch=launch or fake.FakeLaunch())
        out, err = capfd.readouterr()
        return code, out, err

    return run


# --- Wrong use -----------------------------------------------------------------------------------

PEER = "12D3KooWAYucWkX6d52XG8B5M93hDKmYChBEgEZSxufKqmB2ZvpY"
WRONG = {
    ("--nope",): "--nope",
    ("--mesh",): "--mesh",
    ("dance",): "dance",
    ("status", "too", "much"): "too much",
    ("--mesh", "x", "status"): "--mesh is for running a node, not for `status`",
    ("--public", "--no-public"): "contradict",
    ("--log-format", "xml"): "xml",
    ("--listen", "45654"): "--listen '45654'",
    ("--join", "10.0.0.1"): "--join '10.0.0.1'",
    ("--allow", "12D3KooWnobody"): "--allow: '12D3KooWnobody' is not an Ed25519 peer id",
    ("--allow", "x", "status"): "--allow is for running a node",
    ("--key-file", "/there/is/no/such/file"): "/there/is/no/such/file",
    ("devices", "--kind", "gpu"): "kind 'gpu' is not one of",
    ("devices", "--min-memory", "lots"): "'lots' is no amount of memory",
    ("devices", "--limit", "0"): "limit 0",
    ("--mesh", ""): "mesh name",
    ("--data-dir", "/dev/null"): "/dev/null",
    ("new-key",): "PATH",
    ("revoke",): "PEER_ID",
    ("revoke", ""): "PEER_ID: '' is not an Ed25519 peer id",
    ("revoke", "junk"): "PEER_ID: 'junk' is not an Ed25519 peer id",
    ("--founder", "x"): "--founder: 'x' is not an Ed25519 peer id",
    ("status", "--wait", "-1"): "--wait",
    ("status", "--wait", "nan"): "--wait",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_use_is_one_clear_line_and_exit_code_2(call: Any, arguments: tuple[str, ...]) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("sparkle-node: ")
    assert err.count("\n") == 1
    assert WRONG[arguments] in err


def test_the_processes_exit_code_is_the_commands(ask_node: Ask) -> None:
    assert ask_node("--nope") == (2, "", "sparkle-node: No such option '--nope'. (see `sparkle-node --help`)\n")


def test_no_node_is_one_line_and_exit_code_1(call: Any, data_dir: Path) -> None:
    for command, *arguments in (("status",), ("peers",), ("devices",), ("invite",), ("revoke", PEER)):
        assert call(command, *arguments) == (
            1,
            "",
            f"sparkle-node: no node runs on {data_dir}; start one with `sparkle-node`\n",
        )


def test_a_damaged_identity_is_no_wrong_use(call: Any, data_dir: Path) -> None:
    (data_dir / "identity.key").write_bytes(b"damaged")
    (data_dir / "identity.key").chmod(0o600)
    code, _, err = call("id")
    assert (code, err.count("\n")) == (1, 1)
    assert "identity.key" in err
    assert (data_dir / "identity.key").read_bytes() == b"damaged"


def test_an_output_that_cannot_be_written_is_a_failure(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise click.FileError("somewhere", "disk full")

    monkeypatch.setattr(MeshKey, "save", fail)
    code, _, err = call("new-key", "x")
    assert (code, err.count("\n")) == (1, 1)


# --- Answers without a node ----------------------------------------------------------------------


def test_help_has_examples_and_every_option(call: Any) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for text in (
        "Examples:",
        "--mesh",
        "--key-file",
        "--join",
        "--allow",
        "--founder",
        "revoke",
        "--listen",
        "--data-dir",
        "--no-lan",
        "--no-public",
    ):
        assert text in out
    for text in (
        "--public",
        "--log-format",
        "--log-level",
        "id ",
        "status",
        "peers",
        "devices",
        "invite",
        "new-key",
        "Exit codes",
    ):
        assert text in out
    for command in ("id", "status", "peers", "devices", "invite"):
        assert "--json" in call(command, "--help")[1]


def test_version(call: Any) -> None:
    from sparkle_mesh import __version__

    assert call("--version") == (0, f"sparkle-node {__version__}\n", "")


@pytest.mark.parametrize("arguments", [("--help",), ("status",), ("peers",), ("invite",), ("id",), ("--version",)])
def test_commands_that_only_ask_load_little(data_dir: Path, arguments: tuple[str, ...]) -> None:
    program = (
        "import sys; from sparkle_mesh.cli.commands import run_command_line\n"
        "from sparkle_mesh.cli.signals import StopSignals\n"
        "run_command_line(sys.argv[1:], StopSignals())\n"
        "print(sorted({'libp2p', 'numpy', 'sparkle_mesh.node'} & set(sys.modules)), file=sys.stderr)\n"
        "print(sys.argv[1] == 'id' or 'trio' not in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "SPARKLE_DATA_DIR": str(data_dir)},
    )
    assert done.stderr.splitlines()[-2:] == ["[]", "True"]


def test_the_id_is_that_of_the_next_node(call: Any, data_dir: Path) -> None:
    code, out, _ = call("id")
    peer_id = load_or_create_identity(data_dir / "identity.key").peer_id
    assert (code, out) == (0, f"{peer_id}\n")
    assert json.loads(call("id", "--json")[1]) == {"peer_id": peer_id, "running": False}


def test_a_new_key_is_its_owners_and_never_overwritten(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.key"
    code, out, _ = call("new-key", str(path))
    assert code == 0
    assert str(path) in out
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = MeshKey.load(path)
    code, _, err = call("new-key", str(path))
    assert (code, err.count("\n")) == (2, 1)
    assert MeshKey.load(path) == key


# --- A running node ------------------------------------------------------------------------------


def test_commands_ask_the_running_node(call: Any, fake: ModuleType, start: Start, data_dir: Path) -> None:
    node = start(data_dir, "--mesh", "ours")
    node.wait_for("peer joined")
    code, out, err = call("status")
    assert (code, err) == (0, "")
    assert "mesh       ours (no key" in out
    assert f"pid {node.process.pid}" in out
    status = json.loads(call("status", "--json")[1])
    assert (status["mesh"], status["pid"], status["keyed"]) == ("ours", node.process.pid, False)
    assert call("peers")[1].startswith("PEER")
    assert json.loads(call("peers", "--json")[1])[0]["peer_id"] == "12D3KooWPeer"
    assert call("devices", "--kind", "cuda", "--min-memory", "16GB")[1].startswith("PEER")
    (found,) = json.loads(call("devices", "--json")[1])
    assert (found["peer_id"], found["device"]["memory_bytes"], found["age_s"]) == ("12D3KooWPeer", 24 * 2**30, 7.5)
    assert call("devices", "--kind", "opencl") == (0, "no devices\n", "")
    assert call("devices", "--kind", "opencl", "--json") == (0, "[]\n", "")
    code, out, err = call("devices", "--limit", "4096")
    assert (code, out, err) == (1, "", "sparkle-node: the node answers: it has no devices to tell of\n")
    assert call("invite")[1] == "sparkle-invite-1:fake\n"
    assert json.loads(call("invite", "--json")[1]) == {"invite": "sparkle-invite-1:fake"}
    assert call("revoke", PEER) == (0, f"list 3 of revoked peers:\n12D3KooWGone\n{PEER}\n", "")
    revoked = json.loads(call("revoke", PEER, "--json")[1])
    assert revoked == {"sequence": 3, "revoked": ["12D3KooWGone", PEER]}
    assert call("revoke", fake.PEER_ID) == (1, "", "sparkle-node: the node answers: it is the founder\n")
    assert call("id")[1] == f"{fake.PEER_ID}\n"
    assert json.loads(call("id", "--json")[1]) == {"peer_id": fake.PEER_ID, "running": True}


def test_a_command_may_wait_for_a_node_that_is_not_there_yet(start: Start, data_dir: Path, ask_node: Ask) -> None:
    start(data_dir)
    code, out, err = ask_node("invite", "--wait", "40")
    assert (code, out, err) == (0, "sparkle-invite-1:fake\n", "")


@pytest.mark.parametrize("after", [True, False])
def test_the_data_directory_may_stand_before_or_after_the_command(
    call: Any, fake: ModuleType, start: Start, tmp_path: Path, after: bool
) -> None:
    other = tmp_path / "other"
    start(tmp_path / "unused", "--data-dir", str(other)).wait_for("peer joined")
    option = ("--data-dir", str(other))
    assert call(*(("id", *option) if after else (*option, "id")))[1] == f"{fake.PEER_ID}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_the_node_cleanly(start: Start, data_dir: Path, number: signal.Signals) -> None:
    node = start(data_dir)
    node.wait_for("peer joined")
    assert (run_dir(data_dir) / SOCKET_NAME).is_socket()
    node.signal(number)
    code, out, err = node.end()
    assert (code, err) == (0, [])
    assert out[-2].endswith(f"stopping ({number.name}; once more ends at once)")
    assert out[-1].endswith(" stopped")
    assert [path for path in data_dir.rglob("*") if not path.is_dir()] == []


def test_the_second_signal_does_not_wait(start: Start, data_dir: Path, call: Any) -> None:
    node = start(data_dir, FAKE_NODE_HANG="1")
    node.wait_for("peer joined")
    node.signal(signal.SIGINT)
    node.wait_for("stopping (SIGINT")
    node.signal(signal.SIGINT)
    assert node.end()[0] == -signal.SIGINT
    # What it left behind hinders nobody.
    assert (data_dir / LOCK_NAME).exists()
    assert call("status")[0] == 1
    start(data_dir).wait_for("peer joined")
    assert call("status")[0] == 0


def test_the_second_node_is_refused_and_the_first_is_not_disturbed(start: Start, data_dir: Path, call: Any) -> None:
    first = start(data_dir)
    first.wait_for("peer joined")
    code, out, err = start(data_dir).end()
    assert (code, out) == (1, [])
    assert len(err) == 1
    assert f"pid {first.process.pid}" in err[0]
    assert call("status")[0] == 0


def test_two_nodes_started_at_once(start: Start, data_dir: Path) -> None:
    nodes = [start(data_dir) for _ in range(2)]
    ends = [os.pidfd_open(node.process.pid) for node in nodes]
    select.select(ends, [], [], 60)
    for end in ends:
        os.close(end)
    (loser,) = [node for node in nodes if node.process.poll() is not None]
    (winner,) = [node for node in nodes if node is not loser]
    winner.wait_for("peer joined")
    assert loser.end()[0] == 1
    winner.signal(signal.SIGTERM)
    assert winner.end()[0] == 0


def test_a_killed_node_can_be_started_again(start: Start, data_dir: Path, call: Any) -> None:
    first = start(data_dir)
    first.wait_for("peer joined")
    first.signal(signal.SIGKILL)
    assert first.end()[0] == -signal.SIGKILL
    assert (data_dir / LOCK_NAME).exists()
    assert "no node runs on" in call("status")[2]
    second = start(data_dir)
    second.wait_for("peer joined")
    assert f"pid {second.process.pid}" in call("status")[1]


def test_garbage_on_the_control_socket_disturbs_nobody(start: Start, data_dir: Path, call: Any) -> None:
    node = start(data_dir)
    node.wait_for("peer joined")
    for garbage in (b"", b"\xff" * 100, b"\0\0\0\x05abc", os.urandom(4000)):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(run_dir(data_dir) / SOCKET_NAME))
            client.sendall(garbage)
    assert call("status")[0] == 0
    node.signal(signal.SIGTERM)
    assert node.end()[0] == 0


def test_every_line_is_json_if_asked_for(start: Start, data_dir: Path) -> None:
    node = start(data_dir, "--log-format", "json", "--log-level", "debug", "--public")
    assert node.wait_for_event("started")["public"] is True
    assert node.wait_for_event("peer_joined")["peer"]["role"] == "trainer"
    refused = start(data_dir, "--log-format", "json")
    code, _, err = refused.end()
    assert code == 1
    assert json.loads(err[0])["event"] == "error"
    node.signal(signal.SIGTERM)
    code, out, err = node.end()
    assert code == 0
    assert [json.loads(line)["event"] for line in out] == ["started", "peer_joined", "stopping", "stopped"]
    for line in err:
        json.loads(line)


def test_a_reader_that_leaves_ends_the_node(start: Start, data_dir: Path) -> None:
    node = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.exit(0)"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert node.stdin is not None
    node.wait(60)
    # The pipe's reader is gone before the node prints its first line.
    code = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fake_node.py"))],
        stdout=node.stdin,
        timeout=60,
        check=False,
        env={**os.environ, "SPARKLE_DATA_DIR": str(data_dir)},
    ).returncode
    node.stdin.close()
    assert code == 1
    assert [path for path in data_dir.rglob("*") if not path.is_dir()] == []


def test_a_node_without_stdout_runs(data_dir: Path, call: Any) -> None:
    command = f"exec {sys.executable} {Path(__file__).with_name('fake_node.py')} >&- 2>&-"
    environment = {**os.environ, "SPARKLE_DATA_DIR": str(data_dir)}
    with subprocess.Popen(["sh", "-c", command], env=environment) as node:
        while call("status")[0] != 0:
            assert node.poll() is None
        node.send_signal(signal.SIGTERM)
        assert node.wait(60) == 0


def test_errors_of_the_nodes_start(call: Any, fake: ModuleType) -> None:
    address = "/ip4/127.0.0.1/tcp/4"
    code, _, err = call("--listen", address, launch=fake.FakeLaunch(taken=(address,)))
    assert (code, err) == (1, f"sparkle-node: cannot listen on {address}: it is in use\n")


def test_wrong_use_that_only_the_node_finds(call: Any, fake: ModuleType) -> None:
    from sparkle_mesh.errors import UsageError

    launch = fake.FakeLaunch()

    def refuse() -> None:
        raise UsageError("that address is not this machine's")

    launch.on_open = refuse
    assert call(launch=launch) == (2, "", "sparkle-node: that address is not this machine's\n")


def test_options_reach_the_node(call: Any, fake: ModuleType, tmp_path: Path, data_dir: Path) -> None:
    launch = fake.FakeLaunch([lambda: os.kill(os.getpid(), signal.SIGINT)])
    invite = Invite("ours", MeshKey.generate(), ()).encode()
    allowed = Identity.generate().peer_id
    arguments = ("--join", invite, "--listen", "/ip4/127.0.0.1/tcp/0", "--no-lan", "--no-public", "--allow", allowed)
    code, out, err = call(*arguments, "--data-dir", str(tmp_path / "d"), launch=launch)
    assert (code, err) == (0, "")
    (settings,) = launch.opened
    assert (settings.mesh, settings.lan, settings.data_dir) == ("ours", False, tmp_path / "d")
    assert (settings.listen, settings.allow) == (("/ip4/127.0.0.1/tcp/0",), (allowed,))
    assert "mesh       ours (only who holds its key)" in out


def test_a_node_killed_while_it_imports_ends_cleanly(data_dir: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "class AtImport:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'sparkle_mesh.cli.commands': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, AtImport())\n"
        "sys.argv = ['sparkle-node']\n"
        "from sparkle_mesh.cli.node import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "SPARKLE_DATA_DIR": str(data_dir)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" stopped\n")
    assert [path for path in data_dir.rglob("*") if not path.is_dir()] == []


def test_an_empty_data_dir_is_wrong_use(call: Any) -> None:
    for arguments in (["--data-dir", ""], ["id", "--data-dir", ""]):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert "data_dir is empty; name a folder" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line_and_a_failure(data_dir: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "sparkle_mesh.cli.node", "id"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "SPARKLE_DATA_DIR": str(data_dir)},
        )
    assert ended.returncode == 1
    assert ended.stderr == "sparkle-node: the output could not be written: No space left on device\n"


def test_measured_devices_are_printed_and_kept(call: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROFILE_BUDGET_S", 0.3)
    monkeypatch.setattr(limits, "PROFILE_COPY_MAX_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "PROFILE_MATRIX_MAX_COUNT", 128)
    monkeypatch.setattr(measuring, "Registry", lambda: Registry(entry_points=list, extra=[]))
    code, out, _ = call("measure", "--json")
    assert code == 0
    assert json.loads(out)["cpu:0"]["gflops"]["float32"] > 0
    (told,) = with_gflops([detect_cpu()], data_dir)
    assert told.gflops["float32"] > 0
    code, out, _ = call("measure")
    assert code == 0
    assert out.splitlines()[0].split() == ["DEVICE", "GFLOP/S", "MEMORY", "TO", "IT", "FROM", "IT", "LAUNCH"]
    assert out.splitlines()[1].startswith("cpu:0 ")


def test_what_is_being_measured_is_told_where_it_is_wanted(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROFILE_BUDGET_S", 0.1)
    monkeypatch.setattr(limits, "PROFILE_COPY_MAX_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "PROFILE_MATRIX_MAX_COUNT", 64)
    told = io.StringIO()
    measuring.measure(data_dir, told=told)
    assert told.getvalue().startswith("measuring cpu:0 (")


def test_what_was_measured_and_cannot_be_kept_is_an_error(
    call: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PROFILE_BUDGET_S", 0.1)
    monkeypatch.setattr(limits, "PROFILE_COPY_MAX_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "PROFILE_MATRIX_MAX_COUNT", 64)
    data_dir.mkdir(parents=True, exist_ok=True)
    (data_dir / "devices").write_bytes(b"")
    code, out, err = call("measure")
    assert code != 0
    assert out == ""
    assert "cpu:0 was measured to do cannot be kept" in err
