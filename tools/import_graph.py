"""Extract a package's import graph from its source: imports at load time, late, or for types alone.

Import paths in strings (those of megarl/jobs.py, a user's environment) do not count.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["load", "late", "typing"]
"""While the module is loaded, when a function runs, or under ``if TYPE_CHECKING:``."""
KINDS: tuple[Kind, ...] = ("load", "late", "typing")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One import; ``target`` is a module of the package, or else a library."""

    source: str
    target: str
    line: int
    kind: Kind


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """Return every module of a package by name."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def all_imports(root: Path, package: str) -> list[Import]:
    """Return every import in a package's modules; ``from a import b`` is a.b if that is a module, else a."""
    ours = modules_of(root, package)
    return [each for name, path in ours.items() for each in _imports_of(name, path, ours)]


def _imports_of(name: str, path: Path, ours: Collection[str]) -> Iterator[Import]:
    parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node, kind in _statements(ast.parse(path.read_text(encoding="utf-8")), "load"):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [f"{base}.{a.name}" if f"{base}.{a.name}" in ours else base for a in node.names]
        for target in dict.fromkeys(targets):
            yield Import(name, target, node.lineno, kind)


def _statements(node: ast.AST, kind: Kind) -> Iterator[tuple[ast.Import | ast.ImportFrom, Kind]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, kind
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _statements(ast.Module(child.body, []), "typing")
            yield from _statements(ast.Module(child.orelse, []), kind)
        else:
            late = isinstance(child, Function | ast.Lambda) and kind == "load"
            yield from _statements(child, "late" if late else kind)


def cycles(imports: list[Import], kinds: Collection[Kind] = KINDS) -> list[list[str]]:
    """Return groups of modules that reach one another by imports of these kinds, each sorted.

    A package's ``__init__`` runs before its modules; that alone is no edge.
    """
    graph: dict[str, set[str]] = {each.source: set() for each in imports}
    for each in imports:
        if each.kind in kinds and each.target in graph and each.target != each.source:
            graph[each.source].add(each.target)
    reach = {name: _reachable(graph, name) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, todo = set[str](), [start]
    while todo:
        for target in graph[todo.pop()] - seen:
            seen.add(target)
            todo.append(target)
    return seen
