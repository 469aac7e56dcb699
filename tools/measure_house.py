"""Counts what docs/architecture.md says about the size and the shape of the tree.

python tools/measure_house.py              the package in this checkout
python tools/measure_house.py --root DIR   that in another one, e.g. `git worktree add DIR COMMIT`
python tools/measure_house.py --json FILE  write the figures too

Files and functions are measured in lines from first to last, blank lines and docstrings included; parameters
are counted without self and cls. Cycles are groups of modules that import one another: while being loaded,
then with imports inside functions, then with those under TYPE_CHECKING. In megarl/config every line is one of

- declare: fields and what introduces them (imports, docstrings, constants, class bodies),
- check: methods marked @rule, what only they call (it yields Problems or Violations), and files.py,
- read: load, yaml_text, introspect, suggest, violation and the machinery in section.py,
- derive: other methods and functions, the facts that follow from a configuration.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.import_graph import KINDS, Function, all_imports, cycles

_READING = {"load", "yaml_text", "introspect", "suggest", "violation"}
_CHECKING = {"files"}
_FOUND = {"Problems", "Violations", "Iterator[Violation]", "list[Violation]"}


def measure(root: Path, package: str = "megarl") -> dict[str, Any]:
    """All figures of one tree."""
    trees = {path: ast.parse(path.read_text()) for path in sorted((root / package).rglob("*.py"))}
    files = [len(path.read_text().splitlines()) for path in trees]
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, Function)]
    lengths = sorted(_lines(node) for node in functions)
    many = {f"{node.name}": count for node in functions if (count := _parameters(node)) > 6}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    imports = all_imports(root, package)
    methods = {node.name: sum(isinstance(each, Function) for each in node.body) for node in classes}
    return {
        "files": len(files),
        "lines": sum(files),
        "file_median": statistics.median(files),
        "file_longest": max(files),
        "files_under_60_lines": sum(count < 60 for count in files),
        "functions": len(functions),
        "function_median": statistics.median(lengths),
        "function_p90": lengths[int(len(lengths) * 0.9)],
        "function_longest": lengths[-1],
        "over_6_parameters": sum(_parameters(node) > 6 for node in functions),
        "over_9_parameters": sorted(name for name, count in many.items() if count > 9),
        "over_12_methods": {name: count for name, count in sorted(methods.items()) if count > 12},
        "cycles": {kind: cycles(imports, KINDS[: i + 1]) for i, kind in enumerate(KINDS)},
        "config": config_lines(root / package / "config"),
    }


def _lines(node: ast.AST) -> int:
    return int(node.end_lineno - node.lineno + 1)  # type: ignore[attr-defined]


def _parameters(node: Function) -> int:
    arguments = node.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


# --- configuration ---------------------------------------------------------------------------------


def config_lines(folder: Path) -> dict[str, float]:
    """Lines of megarl/config by what they are for."""
    count: Counter[str] = Counter()
    fields = 0
    for path in sorted(folder.glob("*.py")):
        text = path.read_text()
        total, tree = len(text.splitlines()), ast.parse(text)
        if path.stem.startswith("validate"):  # as the tree once was
            count["check"] += total
        elif path.stem == "derived":
            count["derive"] += total
        elif path.stem in _CHECKING:
            count["check"] += total
        elif path.stem in _READING:
            count["read"] += total
        else:
            for node in _outermost_functions(tree):
                kind = "read" if path.stem == "section" else _kind_of(node)
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                while not text.splitlines()[first - 2].strip():  # the blank lines before it are its own
                    first -= 1
                lines = (node.end_lineno or 0) - first + 1
                count[kind] += lines
                total -= lines
            count["declare"] += total
        sections = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
        if path.stem not in _READING | _CHECKING:
            fields += sum(_is_field(each) for node in sections for each in node.body)
    ratio = (count["check"] + count["read"]) / max(1, count["declare"])
    return {**count, "fields": fields, "checking_lines_per_declaring": round(ratio, 2)}


def _outermost_functions(tree: ast.Module) -> Iterator[Function]:
    for node in tree.body:
        for each in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(each, Function):
                yield each


def _kind_of(node: Function) -> str:
    is_rule = any(ast.unparse(each) == "rule" for each in node.decorator_list)
    returns = "" if node.returns is None else ast.unparse(node.returns)
    return "check" if is_rule or returns in _FOUND else "derive"


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)


def main() -> None:
    """Print the figures, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    figures = measure(options.root)
    for name, value in figures.items():
        print(f"{name}: {json.dumps(value)}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
