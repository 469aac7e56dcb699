"""Every key of every configuration has a test that shows its effect."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megarl.config.section import Section
from megarl.jobs import roots

TESTS = Path(__file__).parents[1]
MEGARL = TESTS.parent / "megarl"
ROWS = dict(re.findall(r"^\| (\w+\.\w+) \| (\S+) \|$", (TESTS / "config" / "effects.md").read_text(), re.M))
SELECTORS = ("source", "kind")  # which kind of section it is: without it there is no section


def parts_of(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from parts_of(part)


def keys() -> set[str]:
    """Every key that holds a value, by the class that declares it."""
    found: set[str] = set()
    seen: set[type] = set()
    todo: list[Any] = list(roots().values())
    while todo:
        section = todo.pop()
        if section in seen:
            continue
        seen.add(section)
        for name, field in section.model_fields.items():
            inner = [p for p in parts_of(field.annotation) if isinstance(p, type) and issubclass(p, Section)]
            todo += inner
            if not inner and name not in SELECTORS:
                owner = next(
                    c for c in reversed(section.__mro__) if name in vars(c).get("__annotations__", {})
                )
                found.add(f"{owner.__name__}.{name}")
    return found


def words_of(path: Path, seen: set[Path]) -> set[str]:
    """Every name and every word of a string in a test file and the files of tests/ that it imports."""
    if path in seen or not path.is_file():
        return set()
    seen.add(path)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Constant(value=str(text)):
                found |= set(re.findall(r"\w+", text))
            case ast.keyword(arg=str(name)) | ast.arg(arg=name) | ast.Attribute(attr=name):
                found.add(name)
            case ast.ImportFrom(module=str(module)) if module.startswith("tests"):
                base = TESTS.parent / Path(*module.split("."))
                for each in (base.with_suffix(".py"), *(base / f"{a.name}.py" for a in node.names)):
                    found |= words_of(each, seen)
    return found


def test_the_table_has_every_key_and_no_other() -> None:
    """A key that is new needs a line; one that is gone loses its own."""
    assert keys() - ROWS.keys() == set(), "keys without a line in tests/config/effects.md"
    assert ROWS.keys() - keys() == set(), "lines of keys that there are not"


@pytest.mark.parametrize("test", sorted(set(ROWS.values())))
def test_the_tests_are_there_and_speak_of_their_keys(test: str) -> None:
    file, _, name = test.partition("::")
    path = TESTS / file
    functions = {n.name: n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
    assert name in functions, f"{test} is not there"
    assert any(isinstance(node, ast.Assert | ast.With | ast.Call) for node in ast.walk(functions[name]))
    words = words_of(path, set())
    silent = [key for key, each in ROWS.items() if each == test and key.rpartition(".")[2] not in words]
    assert silent == [], f"{test} does not mention them"


def test_no_key_is_read_by_nobody() -> None:
    """A key that only rules look at changes nothing."""
    read: set[str] = set()
    made: set[str] = set()  # beginnings of names that are put together
    for path in MEGARL.rglob("*.py"):
        tree = ast.parse(path.read_text())
        rules = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and any(isinstance(d, ast.Name) and d.id == "rule" for d in node.decorator_list)
            for inner in ast.walk(node)
        }
        nodes = [node for node in ast.walk(tree) if id(node) not in rules]
        read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        for call in nodes:  # getattr(section, f"prefix_{...}")
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "getattr":
                parts = [each for arg in call.args[1:2] for each in ast.walk(arg)]
                made |= {str(each.value) for each in parts if isinstance(each, ast.Constant)}
    names = {key: key.rpartition(".")[2] for key in keys()}
    silent = {key for key, name in names.items() if name not in read}
    assert {key for key in silent if not names[key].startswith(tuple(m for m in made if len(m) > 3))} == set()
