"""tools/measure_house.py on a package whose figures are known."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from measure_house import config_lines, measure  # noqa: E402

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
    found = measure(tmp_path)["cycles"]
    loaded, late, typing = ["megarl.a", "megarl.b"], ["megarl.c", "megarl.d"], ["megarl.e", "megarl.f"]
    assert found == {"load": [loaded], "late": [loaded, late], "typing": [loaded, late, typing]}


def test_sizes(tmp_path: Path) -> None:
    many = "def f(a, b, c, d, /, e, *, f, g):\n    return a\n"
    write(
        tmp_path, a=many, b="class C:\n    def m(self, a, b, c, d, e, f):\n        return 1\n", config__x=""
    )
    figures = measure(tmp_path)
    assert (figures["files"], figures["lines"], figures["file_longest"]) == (3, 5, 3)
    assert (figures["functions"], figures["function_longest"], figures["over_6_parameters"]) == (2, 2, 1)
