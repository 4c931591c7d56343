"""The project's Python files, parsed once, with the names that they import and call."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Folder in the clone, and the package that its files are imported as ("" for programs).
LIBRARY = {
    "sparkle_mesh": "sparkle_mesh",
    "transport": "sparkle_mesh.transport",
    "collectives": "sparkle_mesh.collectives",
}
PROGRAMS = {"simulations": "simulations", "examples": "", "benchmarks": "", "tests": "", ".ci": ""}


@dataclass(frozen=True)
class Module:
    """A Python file: its dotted name, whether it is a package's ``__init__``, its text and syntax tree."""

    name: str
    text: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    def imports(self) -> Iterator[tuple[int, str]]:
        """Yield ``(line, dotted name)`` of every import, also inside functions; ``from a import b`` is ``a.b``."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, name.name) for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                source = ".".join(filter(None, (self._parent(node.level), node.module)))
                yield from ((node.lineno, f"{source}.{name.name}") for name in node.names)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {
                "import_module",
                "__import__",
            }:
                yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))

    def _parent(self, level: int) -> str:
        if level == 0:
            return ""
        parts = self.name.split(".")
        drop = level - 1 if self.is_package else level
        return ".".join(parts[: len(parts) - drop])

    def uses(self) -> Iterator[tuple[int, str]]:
        """Yield ``(line, dotted name)`` of every imported or built-in name that is used, aliases resolved."""
        origins: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                origins |= {
                    (name.asname or name.name.split(".")[0]): (name.asname and name.name) or name.name.split(".")[0]
                    for name in node.names
                }
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                origins |= {(name.asname or name.name): f"{node.module}.{name.name}" for name in node.names}
        for node in ast.walk(self.tree):
            dotted = ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""
            first, dot, rest = dotted.partition(".")
            known = first in origins or hasattr(builtins, first)
            if known and all(part.isidentifier() for part in dotted.split(".")):
                yield node.lineno, origins.get(first, first) + dot + rest


def read_modules(folder: str, package: str) -> list[Module]:
    """Return the modules of one of the clone's folders."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        parts = parts[:-1] if is_package else parts
        name = ".".join([package, *parts] if package else [folder, *parts])
        found.append(Module(name, path.read_text(encoding="utf-8"), is_package))
    return found


@pytest.fixture(scope="session")
def library() -> list[Module]:
    """Return the modules of the library."""
    return [module for folder, package in LIBRARY.items() for module in read_modules(folder, package)]


@pytest.fixture(scope="session")
def programs() -> list[Module]:
    """Return the modules that are not installed: examples, benchmarks, simulations, tests, checks."""
    return [module for folder, package in PROGRAMS.items() for module in read_modules(folder, package)]


@pytest.fixture(scope="session")
def parse_module() -> Callable[[str, str], Module]:
    """Return a function that makes a module of a name and a text, to plant violations."""
    return Module
