"""tools/measure_house.py on a package with known figures."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from measure_house import config_lines, measure, pickled_collectives, reached  # noqa: E402

from tools.import_graph import modules_of  # noqa: E402

SECTION = '''"""A section."""

from megarl.config.section import Problems, Section, rule


class Sizes(Section):
    """Sizes."""

    low: int = 1
    """Smallest."""
    high: int = 2
    """Largest."""

    @property
    def span(self) -> int:
        """How many there are."""
        return self.high - self.low

    @rule
    def _order(self) -> Problems:
        if self.low > self.high:
            yield "low", "must not exceed high", "high"
'''


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / "megarl" / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_lines_of_a_configuration(tmp_path: Path) -> None:
    write(tmp_path, config__sizes=SECTION, config__load="x = 1\ny = 2\n", config__files="z = 3\n")
    found = config_lines(tmp_path / "megarl" / "config")
    assert found == {
        "declare": 12,
        "derive": 5,
        "check": 5 + 1,
        "read": 2,
        "fields": 2,
        "checking_lines_per_declaring": 0.67,
    }


def test_cycles_of_each_kind(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="import megarl.b",
        b="from megarl import a",
        c="from megarl import d",
        d="def f():\n    from . import c",
        e="from megarl import f",
        f="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import megarl.e",
        config__x="",
    )
    figures = measure(tmp_path)
    found = {kind: figures[f"cycles_{kind}"] for kind in ("load", "late", "typing")}
    loaded, late, typing = ["megarl.a", "megarl.b"], ["megarl.c", "megarl.d"], ["megarl.e", "megarl.f"]
    assert found == {"load": [loaded], "late": [loaded, late], "typing": [loaded, late, typing]}


def test_sizes(tmp_path: Path) -> None:
    many = "def f(a, b, c, d, /, e, *, f, g):\n    return a\n"
    write(
        tmp_path, a=many, b="class C:\n    def m(self, a, b, c, d, e, f):\n        return 1\n", config__x=""
    )
    figures = measure(tmp_path)
    assert (figures["files"], figures["lines"], figures["file_longest"]) == (3, 5, 3)
    assert (figures["functions"], figures["function_longest"], figures["over_6_parameters"]) == (
        2,
        2,
        ["f 7"],
    )


def test_a_step_reaches_functions_by_name_and_methods_of_classes_it_reached(tmp_path: Path) -> None:
    write(
        tmp_path,
        algorithms__grpo="from megarl.a import run\nfrom megarl import b\ndef f(it):\n    run(b.C()).go()\n",
        a="from megarl.unused import never\ndef run(x):\n    return x\n",
        b="from megarl.c import deep\nfrom megarl.d import other\n"
        "class C:\n    def go(self):\n        deep()\n    def stop(self):\n        other()\n",
        c="def deep(): ...\n",
        d="def other(): ...\n",
        unused="def never(): ...\nclass D:\n    def go(self): ...\n",
    )
    trees = {name: ast.parse(path.read_text()) for name, path in modules_of(tmp_path, "megarl").items()}
    found = {module.removeprefix("megarl.") for module in reached(trees, "megarl")}
    assert found == {"algorithms.grpo", "a", "b", "c"}


def test_pickled_collectives_are_counted_where_they_are_called(tmp_path: Path) -> None:
    control = (
        "def broadcast(x):\n    dist.broadcast_object_list([x])\ndef first(f):\n    return broadcast(f())\n"
    )
    uses = "from megarl.control import broadcast, first\nbroadcast(1)\nfirst(len)\na.first(len)\n"
    write(tmp_path, control=control, uses=uses)
    trees = {name: ast.parse(path.read_text()) for name, path in modules_of(tmp_path, "megarl").items()}
    assert pickled_collectives(trees) == ["megarl.control"] * 2 + ["megarl.uses"] * 2


def test_shapes_in_docstrings(tmp_path: Path) -> None:
    texts = [
        "Rewards [N] of groups.",
        "logits [T, V]",
        "hidden [S + 1, H]",
        "see [docs] and list[int]",
        "[1, 2]",
    ]
    code = "\n".join(f"def f{i}():\n    '''{text}'''" for i, text in enumerate(texts))
    write(tmp_path, a=code, config__x="")
    figures = measure(tmp_path)
    assert (figures["documented_functions"], figures["docstrings_with_a_shape"]) == (5, 3)
