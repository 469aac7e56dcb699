"""The judge's process: runs tests whose program is in another process (code_program.py, code_wire.py).

Started as a file in a sandbox of its own. Standard input is JSON: ``tests`` (texts), ``prefix`` (what the
task has given), ``seconds`` (the longest that may be waited for the program, in all). Standard output is
JSON: ``passed`` (one truth value per test), ``said`` (what went wrong, as text), ``outcome`` ("exited", or
"timeout" where the program took too long), ``problem`` (why the tests cannot be judged, else null).
Descriptor 3 brings the program's answers, 4 takes requests.

A name that the tests do not define is, in this order, what the task's prefix defines (modules, constants,
finished functions), a builtin, and a global of the program. Where the tests use no name of the program but
those of builtins ("assert sum(10, 15) == 6") the first of these is the program's.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import random
import select
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

try:
    from megarl.environments import code_mirror as mirror
    from megarl.environments import code_standard as stdlib
    from megarl.environments import code_wire as wire
except ImportError:  # beside this file, in the sandbox
    sys.path.insert(0, os.getcwd())
    mirror = importlib.import_module("code_mirror")
    stdlib = importlib.import_module("code_standard")
    wire = importlib.import_module("code_wire")
    sys.path.pop(0)

_SHOWN = 300
_READABLE = ("__name__", "__qualname__", "__doc__")
# Of frames, code, generators: what would lead to the tests' own variables; and texts that read attributes.
_INNER = ("gi_", "cr_", "ag_", "f_", "tb_", "co_", "func_")
_NEVER = ("mro", "format", "format_map")
_NOT_GIVEN = (types.FrameType, types.TracebackType, types.CodeType, types.ModuleType)
# Methods of values that say how two compare: a result that stands for a value may not say so itself.
_PREDICATES = frozenset(
    [
        "startswith",
        "endswith",
        "isdisjoint",
        "issubset",
        "issuperset",
        "difference",
        "symmetric_difference",
        "intersection",
    ]
)


class OutOfTimeError(wire.GoneError):
    """The program took too long."""


class Patience:
    """Waits for the program, for so many seconds in all."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def __call__(self, descriptor: int, writing: bool) -> None:
        """Until the descriptor is ready. Raises OutOfTimeError."""
        start = time.monotonic()
        reading, writes = ([], [descriptor]) if writing else ([descriptor], [])
        ready = select.select(reading, writes, [], max(self._left, 0.0))
        self._left -= time.monotonic() - start
        if not any(ready):
            raise OutOfTimeError


class JudgeGuard(wire.Guard):
    """The program gets no way to the tests' variables, and its objects do not decide what they are equal to.

    An object of a class of the program's own is never asked about one of the tests' values: not whether they
    are equal or which is smaller, and arithmetic between them only where the tests name the class (a name
    that begins with a capital letter) and the result is again such an object, which then is no number. The
    tests' comparison is Python's, between values.
    """

    looks_up = False

    def __init__(self) -> None:
        self.named: set[Any] = set()
        """Classes of the program that the tests name."""

    def may_give(self, value: Any) -> bool:
        """Nothing that leads to the tests' variables."""
        return not isinstance(value, _NOT_GIVEN)

    def may_read(self, value: Any, name: str) -> bool:
        """Return whether the program may read an attribute of the tests' objects."""
        if name in _NEVER or name.startswith(_INNER):
            return False
        if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
            return name in (*_READABLE, "__call__")
        return not name.startswith("_") or name in _READABLE or name in mirror.OPERATORS

    def may_write(self, value: Any, name: str) -> bool:
        """Attributes of objects of the tests' classes."""
        kinds = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
        return not name.startswith("_") and not isinstance(value, kinds)

    def attribute(self, peer: Any, value: Any, name: str) -> Any:
        """Of an object of the program: all but what would compare it."""
        link: Any = mirror.link_of(value)
        if name in _PREDICATES:
            if not (link.constructed and link.used) and value not in self.named:
                raise AttributeError(f"an object of the program's ({type(value).__name__}) is no value")
        else:
            link.used = True
        return peer.request("attribute", value, name)

    def operate(self, peer: Any, value: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator of an object of the program."""
        if isinstance(value, type) or type(value) is mirror.Function:
            return peer.request("do", value, name, args, kwargs)
        link: Any = mirror.link_of(value)
        other = mirror.link_of(args[0]) if args else None
        if name in mirror.COMPARISONS and other is None:
            return NotImplemented
        if name == "__contains__" and other is None and not (link.constructed and link.used):
            return any(each is args[0] or each == args[0] for each in value)
        if name in mirror.NUMERIC and link.mixed:
            raise TypeError(f"an object of the program's class {type(value).__name__} is no number")
        if name in mirror.ARITHMETIC and other is None and type(value) not in self.named:
            return NotImplemented
        result = peer.request("do", value, name, args, kwargs)
        if name in mirror.ARITHMETIC and result is not NotImplemented:
            made = mirror.link_of(result)
            if other is None or other.mixed or link.mixed:
                if made is None:
                    raise TypeError(f"an object of the program's class {type(value).__name__} is no number")
                made.mixed = True
        return result


class Space(dict[str, Any]):
    """The tests' globals; a name that is not there is looked up in the program."""

    def __init__(self, peer: Any, guard: JudgeGuard) -> None:
        super().__init__(__name__="__main__")
        self._peer, self._guard = peer, guard
        self.shadowed = ""
        """A builtin's name that is the program's."""

    def __missing__(self, name: str) -> Any:
        """The program's global. Raises KeyError."""
        if name.startswith("__") or (hasattr(builtins, name) and name != self.shadowed):
            raise KeyError(name)
        return self.program(name)

    def program(self, name: str) -> Any:
        """The program's global. Raises KeyError."""
        value = self._peer.look_up(name)
        if isinstance(value, mirror.Mirror) and name.lstrip("_")[:1].isupper():
            self._guard.named.add(value)
        return value


class Solution(types.ModuleType):
    """The module ``solution`` of the tests: the program's globals."""

    def __init__(self, space: Space, peer: Any) -> None:
        super().__init__("solution")
        self.__dict__["_space"], self.__dict__["_peer"] = space, peer

    def __getattr__(self, name: str) -> Any:
        """A global of the program."""
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self.__dict__["_space"].program(name)
        except KeyError:
            raise AttributeError(f"the program has no {name}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Another in its place, as a mock is."""
        if name.startswith("__"):
            super().__setattr__(name, value)
        else:
            self.__dict__["_peer"].request("bind", None, name, (value,))

    def __delattr__(self, name: str) -> None:
        """Without it, as a mock leaves it before it puts the old one back."""
        self.__dict__["_peer"].request("unbind", None, name)


def main() -> None:
    """Read the tests, run them, say how it went."""
    request = json.load(sys.stdin.buffer)
    results = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 0)
    os.dup2(silence, 1)
    report = judge(request["tests"], request["prefix"], request["seconds"])
    with os.fdopen(results, "w") as stream:
        json.dump(report, stream)
    os._exit(0)


def judge(tests: list[str], prefix: str, seconds: float) -> dict[str, Any]:
    """Run the tests. Returns what standard output is to have."""
    guard = JudgeGuard()
    peer = wire.Peer(wire.Channel(3, 4, Patience(seconds)), guard, 0)
    space = Space(peer, guard)
    sys.modules["solution"] = Solution(space, peer)
    _watch_seeds(peer)
    passed, said = [False] * len(tests), []
    try:
        peer.greet()
        _give(prefix, space)
        trees = [ast.parse(test) for test in tests]
        space.shadowed = _shadowed(trees, space)
        _offer_imports(trees, peer)
        for number, test in enumerate(tests):
            problem = _run(test, trees[number], number, space, peer)
            if peer.failure is not None:
                raise peer.failure
            passed[number] = problem is None
            said += [] if problem is None else [f"test {number}: {problem}"]
    except OutOfTimeError:
        return {"passed": passed, "said": said, "outcome": "timeout", "problem": None}
    except wire.CannotJudgeError as error:
        return {"passed": passed, "said": said, "outcome": "exited", "problem": str(error)}
    except wire.GoneError as error:
        said.append(f"the program: {error}")
    except BaseException as error:
        said.append(f"the program: {_words(error)}")
    return {"passed": passed, "said": said, "outcome": "exited", "problem": None}


def _run(test: str, tree: ast.Module, number: int, space: Space, peer: Any) -> str | None:
    """Return what went wrong, None if nothing did; raise CannotJudgeError."""
    for name in _names_in_classes(tree):  # Python looks these up without asking the space
        if name not in space and not hasattr(builtins, name):
            try:
                space[name] = space.program(name)
            except KeyError:
                continue
    try:
        exec(compile(test, f"test {number}", "exec", dont_inherit=True), space)
    except (wire.GoneError, wire.CannotJudgeError):
        return "not run to its end"  # judge() looks at the peer
    except SystemExit as error:  # unittest.main() and the like
        return _words(error) if wire.is_from_there(error) or error.code else None
    except ModuleNotFoundError as error:
        if not wire.is_from_there(error) and (error.name or "").split(".")[0] not in sys.stdlib_module_names:
            peer.cannot(f"test {number} imports {error.name}, which is not in the sandbox")
        return _words(error)
    except BaseException as error:
        return _words(error)
    return None


def _words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_SHOWN]
    except BaseException:
        return type(error).__name__


def _give(prefix: str, space: Space) -> None:
    """Define what the task has given and a program need not: not its classes, nor what it is to complete."""
    try:
        tree = ast.parse(prefix)
        code = compile(tree, "prefix", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return  # a head without a body
    found: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(code, found)
    except BaseException:
        return  # it needs what the program is to define
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in functions[:-1]:
        if not _is_stub(node) and isinstance(found.get(node.name), types.FunctionType):
            made = found[node.name]
            copy = types.FunctionType(
                made.__code__, space, made.__name__, made.__defaults__, made.__closure__
            )
            copy.__kwdefaults__ = made.__kwdefaults__
            space[node.name] = copy
    names = {node.name for node in functions} | {"__name__", "__builtins__"}
    for name, value in found.items():
        own_class = isinstance(value, type) and value.__module__ == "__main__"
        if name not in names and not own_class:
            space[name] = value


def _is_stub(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function has only a docstring, ``pass``, ``...`` or ``raise``."""
    return all(
        isinstance(part, ast.Pass | ast.Raise)
        or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        for part in node.body
    )


def _shadowed(trees: list[ast.Module], space: Space) -> str:
    """The builtin whose name is the program's, "" where none is."""
    bound = set(space)
    for tree in trees:
        bound |= set(_bound(tree))
    used = [name for tree in trees for name in _loaded(tree) if name not in bound]
    if any(not hasattr(builtins, name) for name in used):
        return ""
    for name in used:
        try:
            space.program(name)
        except KeyError:
            continue
        return name
    return ""


def _loaded(tree: ast.Module) -> Iterator[str]:
    """Names that are read: by the module's own statements first, then in its functions and classes."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in sorted(tree.body, key=lambda node: isinstance(node, inner)):
        found = [
            each for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)
        ]
        yield from (each.id for each in sorted(found, key=lambda each: (each.lineno, each.col_offset)))


def _bound(tree: ast.Module) -> Iterator[str]:
    """Names that are given a value somewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def _names_in_classes(tree: ast.Module) -> Iterable[str]:
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {each.id for node in classes for each in ast.walk(node) if isinstance(each, ast.Name)}


def _offer_imports(trees: list[ast.Module], peer: Any) -> None:
    """Offer the tests' top-level imports to the program, as if both ran in one process."""
    for tree in trees:
        for node in tree.body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    root = alias.name.split(".")[0]
                    if root in sys.stdlib_module_names and root != "unittest":
                        name = alias.name if alias.asname else root
                        peer.request("offer", None, alias.asname or root, (importlib.import_module(name),))
            elif isinstance(node, ast.ImportFrom) and node.module in (*stdlib.PURE, "typing"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    value = getattr(module, alias.name, None)
                    if stdlib.is_standard(value):
                        peer.request("offer", None, alias.asname or alias.name, (value,))


def _watch_seeds(peer: Any) -> None:
    """A seed that a test sets is the program's as well."""
    for name in ("seed", "setstate"):
        setattr(random, name, _seeded(getattr(random, name), peer))


def _seeded(set_it: Callable[..., None], peer: Any) -> Callable[..., None]:
    def seeded(*args: Any, **kwargs: Any) -> None:
        set_it(*args, **kwargs)
        peer.is_seeded = True

    return seeded


if __name__ == "__main__":
    main()
