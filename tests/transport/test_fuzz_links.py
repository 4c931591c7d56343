"""A short, fixed slice of what ``fuzz_links.py`` runs by the million, and that the harness finds what is wrong."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sparkle_mesh.transport import ciphers, framed, tcp
from sparkle_mesh.transport.ciphers import AES_256_GCM, CIPHERS
from sparkle_mesh.transport.records import RecordOpener, RecordSealer

FOLDER = Path(__file__).parent
NAMES = [
    *("offers", "replies", "refusals", "controls", "openings", "welcomes", "framed"),
    *(f"{layer}-{cipher}" for layer in ("records", "tcp", "striped") for cipher in CIPHERS),
]
SLICE_COUNT = 1000
# Each of them is several streams and their tasks.
STRIPED_SLICE_COUNT = 300
SEED = 7


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("fuzz_links")


def test_no_target_is_left_out(fuzz: Any) -> None:
    with fuzz.all_targets() as targets:
        assert sorted(targets) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
async def test_hostile_bytes_do_no_harm(name: str, fuzz: Any) -> None:
    with fuzz.all_targets() as targets:
        count = STRIPED_SLICE_COUNT if name.startswith("striped") else SLICE_COUNT
        await fuzz.feed(targets[name], name, SEED, range(count))


async def test_a_tcp_stream_may_be_cut_anywhere(fuzz: Any) -> None:
    # In two pieces it arrives whole; without the second one, what came is delivered and the loss is told.
    inputs = fuzz.fuzz_inputs
    key = bytes(range(32))
    plan = [
        (tcp.MESSAGE, tcp.HEAD.pack(3, 5) + b"onesmall"),
        (tcp.MESSAGE, tcp.HEAD.pack(3, 50) + b"two"),
        *((tcp.PAYLOAD, bytes(25)), (tcp.PAYLOAD, b"x" * 25), (tcp.GOODBYE, b"")),
    ]
    with fuzz.sockets_in_memory() as make_socket:
        for cipher in CIPHERS:
            records = inputs.sealed(RecordSealer(cipher, key), plan)
            stream = b"".join(records)
            for cut in range(1, len(stream) + 1):
                for came in (stream, stream[:cut]):
                    sizes = iter((cut, len(stream)))
                    arrivals = inputs.Arrivals(came, lambda sizes=sizes: next(sizes, 1), lambda: False)
                    link = fuzz.tcp_link(make_socket(arrivals), cipher, key)
                    got = await fuzz.everything(Random(cut), link)
                    whole = plan[: inputs.intact(records, came)]
                    fuzz.check_delivery(*got, *inputs.must_come_of_records(whole))


async def test_a_framed_stream_may_be_cut_anywhere(fuzz: Any) -> None:
    inputs = fuzz.fuzz_inputs
    stream = tcp.HEAD.pack(3, 5) + b"onesmall" + tcp.HEAD.pack(0, 50) + b"x" * 50 + tcp.HEAD.pack(2**16 - 1, 0)
    for cut in range(1, len(stream) + 1):
        for came in (stream, stream[:cut]):
            sizes = iter((cut, len(stream)))
            arrivals = inputs.Arrivals(came, lambda sizes=sizes: next(sizes, 1), lambda: False)
            link = framed.FramedLink(fuzz.Stream(arrivals), "mallory", kind="test")
            fuzz.check_delivery(*await fuzz.everything(Random(cut), link), *inputs.must_come_of_frames(came))


# --- The harness itself ----------------------------------------------------------------------------


def without_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every record for the right one."""

    def open_into(self: RecordOpener, record: memoryview, out: memoryview) -> None:
        out[:] = record[4 : 4 + len(out)]

    monkeypatch.setattr(RecordOpener, "open_into", open_into)


def without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give all records one nonce, so that they open in any order."""
    decrypt, encrypt = ciphers._OpenSsl.decrypt_into, ciphers._OpenSsl.encrypt_into
    monkeypatch.setattr(ciphers._OpenSsl, "decrypt_into", lambda self, _, *rest: decrypt(self, 0, *rest))
    monkeypatch.setattr(ciphers._OpenSsl, "encrypt_into", lambda self, _, *rest: encrypt(self, 0, *rest))


def with_an_error_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a check raise what no caller expects."""
    monkeypatch.setattr(tcp, "parse_prefix", lambda prefix: (prefix[0], {77: 1}[prefix[3]]))


@pytest.mark.parametrize("fault", [without_tags, without_numbers, with_an_error_of_another_kind])
async def test_a_fault_is_found_and_told(fault: Any, fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"tcp-{AES_256_GCM}"
    fault(monkeypatch)
    with fuzz.all_targets() as targets, pytest.raises(fuzz.Failure) as caught:
        await fuzz.feed(targets[name], name, SEED, range(SLICE_COUNT))
    assert f"--target {name} --seed {SEED} --first " in str(caught.value)
    assert "bytes: " in str(caught.value)


def test_the_program_says_what_it_did() -> None:
    command = [sys.executable, str(FOLDER / "fuzz_links.py"), "--seed", "3", "--inputs", str(3 * len(NAMES))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{3 * len(NAMES)} inputs; at most" in done.stdout


def test_the_program_fails_with_what_reproduces_it(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import fuzz_links\n"
        "fuzz_links.decode_control = lambda header: header[1000000]\n"
        "sys.exit(fuzz_links.main())\n"
    )
    command = [sys.executable, str(tmp_path / "faulty.py"), "--target", "controls", "--inputs", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "--target controls --seed 0 --first 0 --inputs 1" in done.stderr
