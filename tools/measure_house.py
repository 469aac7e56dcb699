"""Measure the size and shape of the tree, at any revisions, side by side.

python tools/measure_house.py                    this checkout
python tools/measure_house.py f4d4854 .          a revision, and this checkout (.), as a table
python tools/measure_house.py --json FILE REV    write all figures, with the names behind them

Files and functions are measured in lines from first to last, blank lines and docstrings included; parameters
are counted without self and cls. Cycles are groups of modules that import one another: while being loaded,
then with imports inside functions, then with those under TYPE_CHECKING. A GRPO step reaches what
algorithms/grpo.py refers to, and so on: a function by its name, a method by its name on a class that was
reached. That is an upper bound: methods of one name are not distinguished. Pickled collectives are the calls
of torch's *_object functions and of functions around them. A docstring has a shape where it names dimensions
in brackets, as in [T, V]. In megarl/config every line is one of

- declare: fields and what introduces them (imports, docstrings, constants, class bodies),
- check: methods marked @rule, what only they call (it yields Problems or Violations), and files.py,
- read: load, yaml_text, introspect, suggest, violation and the machinery in section.py,
- derive: other methods and functions, the facts that follow from a configuration.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools.import_graph import KINDS, Function, all_imports, cycles, modules_of  # noqa: E402

Trees = dict[str, ast.Module]

_READING = {"load", "yaml_text", "introspect", "suggest", "violation"}
_CHECKING = {"files"}
_FOUND = {"Problems", "Violations", "Iterator[Violation]", "list[Violation]"}
_SHAPE = re.compile(r"\[[A-Z]{1,2}(?: ?[+*/-] ?\w+)?(?:, [\w +*/-]+)*\]")
_ENTRY = "algorithms.grpo"


def measure(root: Path, package: str = "megarl") -> dict[str, Any]:
    """Return all figures of one tree."""
    paths = modules_of(root, package)
    trees = {name: ast.parse(path.read_text()) for name, path in paths.items()}
    files = [len(path.read_text().splitlines()) for path in paths.values()]
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, Function)]
    lengths = sorted(_lines(node) for node in functions)
    imports = all_imports(root, package)
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = {node.name: sum(isinstance(each, Function) for each in node.body) for node in classes}
    documented = [text for node in functions if (text := ast.get_docstring(node))]
    texts = documented + [text for node in (*classes, *trees.values()) if (text := ast.get_docstring(node))]
    step = sorted(reached(trees, package))
    return {
        "files": len(files),
        "lines": sum(files),
        "file_median": statistics.median(files),
        "file_longest": max(files),
        "files_under_60_lines": sum(count < 60 for count in files),
        "files_over_350_lines": sum(count > 350 for count in files),
        "functions": len(functions),
        "function_median": statistics.median(lengths),
        "function_p90": lengths[int(len(lengths) * 0.9)],
        "function_longest": lengths[-1],
        "over_6_parameters": _named(functions, 6),
        "over_9_parameters": _named(functions, 9),
        "classes_over_12_methods": {name: n for name, n in sorted(methods.items()) if n > 12},
        **{f"cycles_{kind}": cycles(imports, KINDS[: i + 1]) for i, kind in enumerate(KINDS)},
        "modules_a_grpo_step_may_reach": step,
        "pickled_collectives": pickled_collectives(trees),
        "imports_of_the_backend": _importers(imports, f"{package}.trainer.megatron", f"{package}.trainer"),
        "imports_of_vllm_modules": _importers(
            imports, f"{package}.rollout.vllm_", f"{package}.rollout.vllm_"
        ),
        "tables_by_id": sum(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "id"
            for tree in trees.values()
            for node in ast.walk(tree)
        ),
        "documented_functions": len(documented),
        "docstrings_with_a_shape": sum(bool(_SHAPE.search(text)) for text in documented),
        "docstrings_opening_with_what": sum(text.startswith("What") for text in texts),
        "docstrings_only_see": sum(bool(re.fullmatch(r"See .{1,60}", text)) for text in texts),
        **{f"config_{name}": value for name, value in config_lines(root / package / "config").items()},
    }


def _lines(node: ast.AST) -> int:
    return int(node.end_lineno - node.lineno + 1)  # type: ignore[attr-defined]


def _parameters(node: Function) -> int:
    arguments = node.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def _named(functions: list[Function], limit: int) -> list[str]:
    return sorted(f"{node.name} {n}" for node in functions if (n := _parameters(node)) > limit)


def _importers(imports: list[Any], target: str, inside: str) -> list[str]:
    """Return modules outside ``inside`` that import ``target`` or a part of it."""
    return sorted(
        {
            each.source
            for each in imports
            if each.target.startswith(target) and not each.source.startswith(inside)
        }
    )


# --- modules that a step reaches --------------------------------------------------------------------


def _names_in(module: str, tree: ast.Module, modules: Trees) -> dict[str, tuple[str, str]]:
    """Resolve a module's global names: (module, name in it); name "" is a module."""
    known = {
        node.name: (module, node.name) for node in tree.body if isinstance(node, (*_FUNCTIONS, ast.ClassDef))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {a.asname: (a.name, "") for a in node.names if a.asname and a.name in modules}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found = (inner, "") if inner in modules else (node.module, alias.name)
                if found[0] in modules:
                    known[alias.asname or alias.name] = found
    return known


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def reached(trees: Trees, package: str, entry: str = _ENTRY) -> set[str]:
    """Return the modules with a function that a GRPO step may run (see above)."""
    start = f"{package}.{entry}"
    if start not in trees:
        return set()
    names = {module: _names_in(module, tree, trees) for module, tree in trees.items()}
    inside = {
        (module, node.name): node
        for module, tree in trees.items()
        for node in tree.body
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef))
    }
    todo: list[tuple[str, ast.AST]] = [
        (start, node) for node in trees[start].body if isinstance(node, (*_FUNCTIONS, ast.ClassDef))
    ]
    methods: dict[str, list[tuple[str, ast.AST]]] = defaultdict(list)  # of classes reached, by name
    asked, seen, modules = set[str](), set[int](), set[str]()

    def reach(module: str, node: ast.AST) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if not isinstance(node, ast.ClassDef):
            todo.append((module, node))
            return
        for base in node.bases:
            follow(module, base)
        for each in node.body:
            if isinstance(each, _FUNCTIONS):
                if each.name in asked or each.name.startswith("__"):
                    todo.append((module, each))
                else:
                    methods[each.name].append((module, each))

    def follow(module: str, expression: ast.AST) -> None:
        for node in ast.walk(expression):
            if isinstance(node, ast.Name) and node.id in names[module]:
                target, name = names[module][node.id]
                for _ in range(3):  # a package re-exports names
                    if (target, name) in inside or name not in names.get(target, {}):
                        break
                    target, name = names[target][name]
                if (target, name) in inside:
                    reach(target, inside[target, name])
            elif isinstance(node, ast.Attribute):
                if isinstance(node.value, ast.Name):
                    of, empty = names[module].get(node.value.id, ("", "-"))
                    if not empty and (of, node.attr) in inside:
                        reach(of, inside[of, node.attr])
                if node.attr not in asked:
                    asked.add(node.attr)
                    todo.extend(methods.pop(node.attr, []))

    while todo:
        module, node = todo.pop()
        if isinstance(node, ast.ClassDef):
            reach(module, node)
            continue
        modules.add(module)
        follow(module, node)
    return modules


def pickled_collectives(trees: Trees) -> list[str]:
    """Return call sites, by module: of torch's own, and of functions around them."""

    def called(node: ast.AST) -> str:
        if not isinstance(node, ast.Call):
            return ""
        return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")

    torch_own = re.compile(r"(all_gather|gather|broadcast|scatter|send|recv)_object(_list)?")
    wrappers: set[tuple[str, str]] = set()
    for module, tree in trees.items():
        for node in tree.body:
            if isinstance(node, _FUNCTIONS):
                calls = {called(each) for each in ast.walk(node)}
                around = any((module, name) in wrappers for name in calls)
                if around or any(torch_own.fullmatch(name) for name in calls):
                    wrappers.add((module, node.name))
    sites = []
    for module, tree in trees.items():
        known = _names_in(module, tree, trees)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (name := called(node)):
                own = bool(torch_own.fullmatch(name))
                around = isinstance(node.func, ast.Name) and known.get(name) in wrappers
                if own or around:
                    sites.append(module)
    return sorted(sites)


# --- configuration ---------------------------------------------------------------------------------


def config_lines(folder: Path) -> dict[str, float]:
    """Return the lines of megarl/config by purpose."""
    count: Counter[str] = Counter()
    fields = 0
    for path in sorted(folder.glob("*.py")):
        text = path.read_text()
        total, tree = len(text.splitlines()), ast.parse(text)
        if path.stem.startswith("validate"):  # in earlier revisions
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
                while not text.splitlines()[first - 2].strip():  # include the blank lines before it
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


def at_revision(revision: str, folder: Path) -> Path:
    """Return the package of a revision, unpacked into ``folder``; "." is this checkout."""
    if revision == ".":
        return ROOT
    archive = subprocess.run(
        ["git", "archive", revision, "megarl"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{len(value)} ({', '.join(f'{k} {v}' for k, v in value.items())})"
    return str(len(value) if isinstance(value, list) else value)


def main() -> None:
    """Print the figures of each revision, and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("revisions", nargs="*", default=["."], metavar="REVISION")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = {}
    for revision in options.revisions:
        with tempfile.TemporaryDirectory() as folder:
            found[revision] = measure(at_revision(revision, Path(folder)))
    print(f"| | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for name in next(iter(found.values())):
        values = (_shown(figures.get(name, "")) for figures in found.values())
        print(f"| {name.replace('_', ' ')} | {' | '.join(values)} |")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
