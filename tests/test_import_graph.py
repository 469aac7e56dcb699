"""The import graph of megarl/: no cycles, one direction, heavy libraries only where they belong.

Every import counts: at the top of a file, inside a function (which keeps start-up fast, and changes nothing
about what a module knows), and under `if TYPE_CHECKING:`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.import_graph import Import, all_imports, cycles, modules_of

ROOT = Path(__file__).parents[1]
PACKAGE = "megarl"

# Which part may import which, from the bottom up: a line names parts above it only, so parts have no cycle.
# All may import errors, and all below config what stands above it.
MAY_IMPORT = {
    "errors": "",
    "terminal": "",
    "files": "",
    "records": "",
    "layout": "",
    "dtypes": "",
    "jobs": "",
    "config": "jobs files dtypes",
    "run_directory": "",
    # devices and processes
    "ops": "",
    "platform": "",
    "cluster": "ops platform",
    # stages of a step, which meet in records
    "models": "",
    "weights": "models cluster",
    "advantages": "ops",
    "losses": "ops",
    "batching": "ops losses cluster",
    "environments": "cluster",
    "data": "environments",
    "inference": "models weights cluster ops platform",
    "trainer": "batching losses weights models ops platform cluster",
    "metrics": "run_directory",
    # tools without a run
    "simulate": "models weights",
    "convert": "models weights trainer",
    # what joins the stages, and what starts it
    "runs": "trainer metrics models weights cluster platform run_directory",
    "sampling": "runs data environments inference advantages metrics cluster platform",
    "loops": "sampling runs data environments inference advantages batching losses trainer metrics models"
    " weights simulate convert cluster platform run_directory",
    "algorithms": "loops runs data advantages batching losses trainer models weights ops cluster",
    "arguments": "",
    "launch": "cluster",
    "push": "",
    "recipes": "",
    "init": "cluster",
    "completion": "",
    "foreign_output": "",
    "opening": "models",
    "doctor": "cluster environments ops platform",
    "cli": "arguments foreign_output opening launch push recipes init completion run_directory doctor"
    " loops convert simulate metrics models weights cluster platform",
    "api": "run_directory cluster simulate cli",
    "__main__": "cli",
}
# Where a library may be imported (prefixes of modules).
ONLY_IN = {
    "megatron": ("megarl.trainer.megatron", "megarl.platform"),
    "vllm": ("megarl.inference.vllm",),
    "ray": ("megarl.cluster", "megarl.inference", "megarl.environments"),
    # a backend is one folder, which one module chooses; convert compares logits with Hugging Face's
    "megarl.trainer.megatron": ("megarl.trainer.megatron", "megarl.trainer.build", "megarl.convert"),
}
FORBIDDEN = {
    # config is read before anything heavy is loaded, records travel between processes
    "megarl.config": ("torch", "vllm", "ray", "transformers", "megatron"),
    "megarl.errors": ("torch", "megarl"),
}
# Cycles that are there, with what will end them. To be empty.
KNOWN_CYCLES: list[list[str]] = []


def part_of(module: str) -> str:
    """The line of MAY_IMPORT that a module belongs to; "" for the package itself."""
    return module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]


def is_under(module: str, prefix: str) -> bool:
    """Whether a module is `prefix`, or inside it; a prefix ending in _ is the beginning of names."""
    return module == prefix or module.startswith(prefix if prefix.endswith("_") else prefix + ".")


def permitted(part: str) -> set[str]:
    """The parts that a part may import, itself and the package included."""
    if not part:
        return {""}
    assert part in MAY_IMPORT, f"{part} has no line in MAY_IMPORT: add it, here and in docs/architecture.md"
    order = list(MAY_IMPORT)
    free = order[: order.index("config") + 1] if order.index(part) > order.index("config") else ["errors"]
    return {"", part, *MAY_IMPORT[part].split(), *free}


def misplaced(imports: list[Import]) -> list[str]:
    """Every import that breaks MAY_IMPORT, ONLY_IN or FORBIDDEN, as a line to read."""
    lines = []
    for each in imports:
        where = f"{each.source}:{each.line} imports {each.target}"
        for library, homes in ONLY_IN.items():
            if is_under(each.target, library) and not any(is_under(each.source, home) for home in homes):
                lines.append(f"{where}: {library} belongs in {', '.join(homes)}")
        for module, libraries in FORBIDDEN.items():
            if is_under(each.source, module) and any(is_under(each.target, name) for name in libraries):
                lines.append(f"{where}: not in {module}")
        source = part_of(each.source)
        if is_under(each.target, PACKAGE) and part_of(each.target) not in permitted(source):
            lines.append(f"{where}: {source} may import {MAY_IMPORT[source] or 'no other part'}")
    return lines


def test_megarl_has_no_cycle_of_any_kind():
    assert cycles(all_imports(ROOT, PACKAGE)) == KNOWN_CYCLES


def test_megarl_imports_go_one_way():
    assert misplaced(all_imports(ROOT, PACKAGE)) == []


def test_the_table_has_every_part_once_and_goes_one_way():
    parts = {part_of(module) for module in modules_of(ROOT, PACKAGE)} - {""}
    assert parts == set(MAY_IMPORT)
    above = set[str]()
    for part, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= above, f"{part} names a part that stands below it"
        above.add(part)


def test_the_architecture_page_has_the_same_table():
    page = (ROOT / "docs" / "architecture.md").read_text().partition("## Who may import whom")[2]
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    assert {part.strip(" `"): " ".join(names.split()) for part, names in rows} == MAY_IMPORT


@pytest.mark.parametrize("module", ["megarl", "megarl.cli", "megarl.config.load", "megarl.records"])
def test_light_modules_load_nothing_heavy(module: str):
    """In a process of its own; also through whatever they import in turn."""
    code = f"import sys, {module}; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    heavy = {"torch", "vllm", "ray", "megatron", "transformers", "numpy", "datasets"}
    if module == "megarl.records":  # of arrays
        heavy.remove("numpy")
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
    return all_imports(root, PACKAGE)


TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import megarl.x"


@pytest.mark.parametrize("back", ["import megarl.x", "def f():\n    from megarl import x", TYPING])
def test_a_cycle_of_each_kind_is_found(tmp_path: Path, back: str):
    imports = _package(
        tmp_path, x="from megarl import y", y="from .z import thing", z=back, w="import megarl.x"
    )
    assert cycles(imports) == [["megarl.x", "megarl.y", "megarl.z"]]
    assert cycles(imports, ["load"]) == ([["megarl.x", "megarl.y", "megarl.z"]] if back[0] == "i" else [])


def test_a_module_may_import_its_package(tmp_path: Path):
    files = {"a____init__": "from megarl.a.b import f", "a__b": "def f(): ..."}
    assert cycles(_package(tmp_path, **{k.replace("__", "__in__", 1): v for k, v in files.items()})) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("losses__in__kl", "import megatron.core", "megatron belongs in"),
        ("inference__in__interface", "def f():\n    from vllm import LLM", "vllm belongs in"),
        ("metrics__in__sinks", "import ray.util", "ray belongs in"),
        ("config__in__load", "def f():\n    import torch", "not in megarl.config"),
        ("ops__in__pack", "from megarl.batching import plan", "ops may import no other part"),
        ("trainer__in__step", "import megarl.cli", "trainer may import"),
        (
            "environments__in__make",
            "def f():\n    from megarl.data import sft",
            "environments may import cluster",
        ),
        (
            "models__in__moe",
            TYPING.replace("megarl.x", "megarl.trainer.step"),
            "models may import no other part",
        ),
    ],
)
def test_a_misplaced_import_is_named(tmp_path: Path, file: str, text: str, complaint: str):
    [line] = misplaced(_package(tmp_path, **{file: text}))
    assert file.replace("__in__", ".") in line
    assert complaint in line


def test_permitted_imports_pass(tmp_path: Path):
    files = {
        "trainer__in__megatron__in__model": "import megatron.core\nfrom megarl.models import table",
        "inference__in__vllm__in__worker": "import vllm.config, ray",
        "algorithms__in__grpo": "from megarl.losses import policy\nfrom ..ops import pack",
    }
    assert misplaced(_package(tmp_path, **files)) == []
