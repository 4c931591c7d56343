"""Check the documentation: links lead somewhere, Python compiles and uses names that exist, commands exist.

Looks into every Markdown file of the clone. Links to other sites are not followed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".git", ".venv", "build", "dist", "node_modules", ".hypothesis", ".pytest_cache"}
FENCE = re.compile(r"^(```+|~~~+)\s*(\w*)")
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")


class Block(NamedTuple):
    """A fenced block of code."""

    line: int
    language: str
    text: str


class Page(NamedTuple):
    """What matters of a Markdown file: its prose by line, its code, its headings' anchors."""

    prose: list[tuple[int, str]]
    blocks: list[Block]
    anchors: set[str]


def parse(text: str) -> Page:
    """Take Markdown apart."""
    page = Page([], [], set())
    fence, language, start = "", "", 0
    code: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        mark = FENCE.match(line.strip())
        if fence and line.strip() == fence:
            page.blocks.append(Block(start, language, "\n".join(code) + "\n"))
            fence = ""
        elif fence:
            code.append(line)
        elif mark:
            fence, language, start, code = mark[1], mark[2], number + 1, []
        else:
            page.prose.append((number, line))
            if heading := HEADING.match(line):
                page.anchors.add(anchor_of(heading[1]))
    if fence:
        page.blocks.append(Block(start, "unclosed", "\n".join(code)))
    return page


def anchor_of(heading: str) -> str:
    """Return the anchor that GitHub gives to ``heading``."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")


def link_problems(path: Path, page: Page) -> Iterator[str]:
    """Yield what is wrong with the links of ``page``."""
    for number, line in page.prose:
        for target in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            destination = (path.parent / file).resolve() if file else path
            if not destination.exists():
                yield f"{path}:{number}: {target} leads nowhere"
            elif anchor and anchor not in parse(destination.read_text(encoding="utf-8")).anchors:
                yield f"{path}:{number}: {destination.name} has no heading for #{anchor}"


def code_problems(path: Path, page: Page, root: Path) -> Iterator[str]:
    """Yield what is wrong with the code of ``page``."""
    for block in page.blocks:
        if block.language == "unclosed":
            yield f"{path}:{block.line - 1}: this block of code does not end"
        elif block.language in {"python", "py"}:
            yield from (f"{path}:{block.line + line}: {what}" for line, what in python_problems(block.text))
        elif block.language in {"sh", "bash", "shell", "console"}:
            yield from (f"{path}:{block.line + line}: {what}" for line, what in shell_problems(block.text, root))


def python_problems(text: str) -> Iterator[tuple[int, str]]:
    """Yield what is wrong with a block of Python, with the line in the block."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield (error.lineno or 1) - 1, f"not Python: {error.msg}"
        return
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "sparkle_mesh":
                    aliases[name.asname or name.name.split(".")[0]] = name.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparkle_mesh":
            for name in node.names:
                if not exists(node.module or "", name.name):
                    yield node.lineno - 1, f"{node.module} has no {name.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            module = aliases[node.value.id]
            if not exists(module, node.attr):
                yield node.lineno - 1, f"{module} has no {node.attr}"


def exists(module: str, name: str) -> bool:
    """Return whether ``from module import name`` would work."""
    try:
        if hasattr(importlib.import_module(module), name):
            return True
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        if error.name not in {module, f"{module}.{name}"}:
            raise  # it exists, and is broken
        return False
    return True


def shell_problems(text: str, root: Path) -> Iterator[tuple[int, str]]:
    """Yield the make targets, programs and commands in a block of shell that do not exist."""
    targets = set(re.findall(r"(?m)^([a-z]+):", (root / "Makefile").read_text(encoding="utf-8")))
    for number, line in enumerate(text.splitlines()):
        command = line.strip().removeprefix("$ ")
        match = re.match(r"make ([a-z]\w*)", command)
        if match and match[1] not in targets:
            yield number, f"make has no target {match[1]}"
        match = re.match(r"(?:\S*/)?python3? ((?:examples|benchmarks)/[\w/.-]+\.py)\b", command)
        if match and not (root / match[1]).exists():
            yield number, f"{match[1]} does not exist"


def problems(root: Path) -> list[str]:
    """Return what is wrong with the documentation under ``root``."""
    found: list[str] = []
    for path in sorted(root.rglob("*.md")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            page = parse(path.read_text(encoding="utf-8"))
            found += [*link_problems(path, page), *code_problems(path, page, root)]
    return found


def main() -> int:
    """Print what is wrong; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="the folder to look into (the clone)")
    found = problems(parser.parse_args().root.resolve())
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
