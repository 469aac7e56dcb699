"""The import graph of megarl/: no cycles, one direction, heavy libraries only where they belong.

Imports under `if TYPE_CHECKING:` do not count. Imports inside functions count for what a module may
know, and not for cycles (they are how start-up stays fast, and run after all modules are loaded).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "megarl"

# Who may import what (prefixes of modules; docs/architecture.md, "Layout").
ONLY_IN = {
    "megatron": ("megarl.trainer.megatron", "megarl.platform"),
    "vllm": ("megarl.rollout.vllm_",),
    "ray": ("megarl.cluster", "megarl.rollout", "megarl.environments"),
}
FORBIDDEN = {
    # config is read before anything heavy is loaded, records travel between processes
    "megarl.config": ("torch", "vllm", "ray", "transformers", "megatron"),
    "megarl.errors": ("torch", "megarl"),
}
# From the bottom up: a module imports from its own layer or from a lower one.
LAYERS = [
    ("megarl", "megarl.errors"),
    ("megarl.records", "megarl.layout", "megarl.jobs", "megarl.config", "megarl.rundir"),
    ("megarl._C", "megarl.ops", "megarl.platform"),
    (
        *("megarl.advantages", "megarl.cluster", "megarl.data", "megarl.environments", "megarl.losses"),
        *("megarl.metrics", "megarl.models", "megarl.packing", "megarl.rollout", "megarl.trainer"),
        *("megarl.convert", "megarl.simulate", "megarl.weights"),
    ),
    ("megarl.algorithms",),
    ("megarl.launch", "megarl.doctor", "megarl.cli", "megarl.__main__"),
]


@dataclass(frozen=True)
class Import:
    source: str  # the module that imports
    target: str  # what it imports, as a module where it is one of ours
    line: int
    at_import_time: bool


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """Every module of a package by name."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _statements(node: ast.AST, top: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, top
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _statements(other, top)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _statements(child, top and not inside)


def imports_of(name: str, path: Path, ours: dict[str, Path]) -> Iterator[Import]:
    """What one module imports; `from a import b` is a.b where that is a module, else a."""
    is_package = path.name == "__init__.py"
    for node, top in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                parents = name.split(".") if is_package else name.split(".")[:-1]
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            targets = [f"{base}.{a.name}" if f"{base}.{a.name}" in ours else base for a in node.names]
        for target in dict.fromkeys(targets):
            yield Import(name, target, node.lineno, top)


def all_imports(root: Path = ROOT, package: str = PACKAGE) -> list[Import]:
    ours = modules_of(root, package)
    return [each for name, path in ours.items() for each in imports_of(name, path, ours)]


def is_under(module: str, prefix: str) -> bool:
    """Whether a module is `prefix`, or inside it; a prefix ending in _ is the beginning of names."""
    return module == prefix or module.startswith(prefix if prefix.endswith("_") else prefix + ".")


def find_cycle(imports: list[Import], package: str) -> list[str] | None:
    """A cycle of modules that import one another while being loaded, or None."""
    graph: dict[str, set[str]] = {}
    for each in imports:
        # A package's __init__ runs before its modules: `from megarl.x import y` inside megarl.x is
        # an edge to the package only when y is not a module (then the package must be complete).
        if each.at_import_time and is_under(each.target, package) and each.target != each.source:
            graph.setdefault(each.source, set()).add(each.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def layer_of(module: str) -> int:
    """The most specific layer a module belongs to."""
    matches = [
        (len(prefix), index)
        for index, layer in enumerate(LAYERS)
        for prefix in layer
        if (module == prefix if prefix == PACKAGE else is_under(module, prefix))
    ]
    assert matches, f"{module} is in no layer: add it to LAYERS and to docs/architecture.md"
    return max(matches)[1]


def misplaced(imports: list[Import]) -> list[str]:
    """Every import that breaks ONLY_IN, FORBIDDEN or LAYERS, as a line to read."""
    lines = []
    for each in imports:
        where = f"{each.source}:{each.line} imports {each.target}"
        for library, homes in ONLY_IN.items():
            if is_under(each.target, library) and not any(is_under(each.source, home) for home in homes):
                lines.append(f"{where}: {library} belongs in {', '.join(homes)}")
        for module, libraries in FORBIDDEN.items():
            if is_under(each.source, module) and any(is_under(each.target, name) for name in libraries):
                lines.append(f"{where}: not in {module}")
        if is_under(each.target, PACKAGE) and layer_of(each.target) > layer_of(each.source):
            lines.append(f"{where}: that is a higher layer")
    return lines


def test_megarl_has_no_import_cycle():
    assert find_cycle(all_imports(), PACKAGE) is None


def test_megarl_imports_go_one_way():
    assert misplaced(all_imports()) == []


@pytest.mark.parametrize("module", ["megarl", "megarl.cli", "megarl.config.load", "megarl.records"])
def test_light_modules_load_nothing_heavy(module: str):
    """In a process of its own; also through whatever they import in turn."""
    code = f"import sys, {module}; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    heavy = {"torch", "vllm", "ray", "megatron", "transformers", "numpy", "datasets"}
    assert heavy & set(done.stdout.split()) == set()


def test_importing_megarl_and_its_platform_patches_nothing():
    """torch.cuda and torch.Tensor are as torch made them until platform.install() is called."""
    code = """
import torch
watched = (torch, torch.cuda, torch.cuda.nvtx, torch.Tensor, torch.nn.Module, torch.distributed)
before = [dict(vars(each)) for each in watched]
import megarl, megarl.platform, megarl.platform.cpu, megarl.ops
for each, old in zip(watched, before):
    for key, value in vars(each).items():
        # A submodule shows up in its package when somebody imports it: that is no patch.
        if type(value).__name__ != 'module' and old.get(key) is not value:
            print(each.__name__, key)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == ""


# The checks themselves, on a package made to break them.


def _package(root: Path, **files: str) -> list[Import]:
    for name, text in files.items():
        path = root / "megarl" / (name.replace("__in__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return all_imports(root)


def test_a_cycle_is_found_and_a_late_or_typing_import_is_none(tmp_path: Path):
    cyclic = _package(tmp_path / "a", x="from megarl import y", y="import megarl.z", z="from .x import thing")
    assert set(find_cycle(cyclic, PACKAGE) or []) == {"megarl.x", "megarl.y", "megarl.z"}
    late = _package(tmp_path / "b", x="from megarl import y", y="def f():\n    import megarl.x")
    assert find_cycle(late, PACKAGE) is None
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import megarl.x"
    assert find_cycle(_package(tmp_path / "c", x="from megarl import y", y=typing), PACKAGE) is None


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("losses__in__kl", "import megatron.core", "megatron belongs in"),
        ("rollout__in__engine", "def f():\n    from vllm import LLM", "vllm belongs in"),
        ("metrics__in__sinks", "import ray.util", "ray belongs in"),
        ("config__in__load", "def f():\n    import torch", "not in megarl.config"),
        ("ops__in__pack", "from megarl.packing import plan", "higher layer"),
        ("trainer__in__step", "import megarl.cli", "higher layer"),
    ],
)
def test_a_misplaced_import_is_named(tmp_path: Path, file: str, text: str, complaint: str):
    [line] = misplaced(_package(tmp_path, **{file: text}))
    assert file.replace("__in__", ".") in line
    assert complaint in line


def test_permitted_imports_pass(tmp_path: Path):
    files = {
        "trainer__in__megatron__in__model": "import megatron.core\nfrom megarl.models import table",
        "rollout__in__vllm_worker": "import vllm.config, ray",
        "algorithms__in__grpo": "from megarl.losses import policy\nfrom ..ops import pack",
    }
    assert misplaced(_package(tmp_path, **files)) == []
