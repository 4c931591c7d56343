"""The README's code: the Python runs, the shell parses, what it names is there."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def pages(root):
    """Return the text of the pages whose code and links are checked here."""
    return {path: path.read_text() for path in (root / "README.md", root / "benchmarks" / "README.md")}


@pytest.fixture
def blocks(pages):
    """Return (language, code) of every code block."""
    found = [match.groups() for text in pages.values() for match in BLOCK.finditer(text)]
    assert {language for language, _ in found} == {"python", "sh"}
    return found


def test_python_compiles(blocks):
    for language, code in blocks:
        if language == "python":
            compile(code, "README.md", "exec")


def test_first_example_prints_what_is_said(processes, blocks, mesh_name, tmp_path):
    code = next(code for language, code in blocks if language == "python")
    assert code.count('"my-run"') == 1
    script = tmp_path / "readme.py"
    script.write_text(code.replace("my-run", mesh_name))
    ended = processes.run_together([[script], [script]])
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert sorted(one.out for one in ended) == ["rank 0 of 2: 0.5\n", "rank 1 of 2: 0.5\n"]


def test_example_with_an_invite_trains(processes, blocks, mesh_name, tmp_path):
    code = [code for language, code in blocks if language == "python"][1]
    starter = tmp_path / "starter.py"
    starter.write_text(
        "import sys; from pathlib import Path; from sparkle_mesh import MeshKey\n"
        "from sparkle_mesh.membership.invite import Invite\n"
        "Path(sys.argv[2]).write_text(Invite(name=sys.argv[1], key=MeshKey.generate(), addresses=()).encode())\n"
    )
    invite = tmp_path / "invite.txt"
    assert processes.run(starter, mesh_name, invite).code == 0
    script = tmp_path / "readme.py"
    script.write_text(f"{code}\n\ntrain({str(invite)!r})\n")
    ended = processes.run_together([[script], [script]])
    assert [(one.code, one.out) for one in ended] == [(0, ""), (0, "")], [one.err for one in ended]


def test_shell_parses_and_names_what_exists(root, blocks):
    shell = shutil.which("bash")
    assert shell is not None
    for language, code in blocks:
        if language != "sh":
            continue
        parsed = subprocess.run([shell, "-n"], input=code, text=True, capture_output=True, check=False)
        assert parsed.returncode == 0, parsed.stderr
        for script in re.findall(r"python (\S+\.py)", code):
            assert (root / script).is_file(), script
        for target in re.findall(r"^make (\w+)", code, re.MULTILINE):
            assert re.search(rf"^{target}:", (root / "Makefile").read_text(), re.MULTILINE), target


def test_commands_know_the_options_that_are_shown(processes, blocks):
    shown: dict[str, set[str]] = {}
    for language, code in blocks:
        if language == "sh":
            for line in code.splitlines():
                for match in re.finditer(
                    r"(?:^|[(;] ?)(?:python (\S+\.py)|(sparkle-node(?: [a-z]\S*)?))([^;)]*)", line
                ):
                    options = re.findall(r"(?<!\S)(--[\w-]+)", match[3])
                    shown.setdefault(match[1] or match[2], set()).update(options)
    node = {"sparkle-node", "sparkle-node new-key", "sparkle-node invite"}
    programs = {"examples/train_digits.py", "examples/digits_kernels.py", "benchmarks/all_reduce.py"}
    assert set(shown) == {*programs, *node}
    for command, options in shown.items():
        program, *subcommand = command.split()
        ended = processes.run(
            *(["-c", "from sparkle_mesh.cli.node import main; main()"] if command in node else [program]),
            *subcommand,
            "--help",
        )
        assert ended.code == 0, ended.err
        assert options <= set(re.findall(r"--[\w-]+", ended.out)), command


def test_links_lead_somewhere(pages):
    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
        anchors = {
            re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)
        }
        for anchor in re.findall(r"\]\(#([\w-]+)\)", text.replace("\n", " ")):
            assert anchor in anchors, f"{page.name}: #{anchor}"
