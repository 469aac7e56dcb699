"""Tools: a calculator, Python in a sandbox, search over documents (BM25)."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megarl.environments import sandbox
from megarl.environments.sandbox_streams import Limits
from megarl.errors import UserError

if TYPE_CHECKING:
    from megarl.config.environments import ToolsConfig

_WORD = re.compile(r"\w+")
_MAX_DIGITS = 1000
_OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


class ToolError(ValueError):
    """An invalid call; the model reads the message and may retry."""


class Tool(Protocol):
    """One tool. ``run`` raises ToolError for invalid calls; any other exception is a failure."""

    name: str
    schema: dict[str, Any]
    note: str  # for the log; may be empty

    def run(self, arguments: dict[str, Any]) -> str:
        """Return the result for the model."""
        ...


def describe(name: str, about: str, **parameters: str) -> dict[str, Any]:
    """Return the JSON schema of a tool for chat templates; all parameters are required strings."""
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


def text_argument(arguments: dict[str, Any], name: str) -> str:
    """Return a text argument; ToolError if it is missing or not text."""
    value = arguments.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ToolError(f"the argument {name!r} must be text")
    return value


class Calculator:
    """Arithmetic on numbers: + - * / // % ** and brackets."""

    name = "calculator"
    note = ""
    schema = describe(name, "Evaluates arithmetic.", expression="e.g. (3 + 4) * 12")

    def run(self, arguments: dict[str, Any]) -> str:
        """See Tool."""
        text = text_argument(arguments, "expression")
        try:
            value = _evaluate(ast.parse(text.strip().replace("^", "**"), mode="eval").body)
        except (SyntaxError, UnicodeError):
            raise ToolError(f"{text!r} is no arithmetic expression") from None
        except (ArithmeticError, RecursionError, MemoryError, ValueError) as error:
            if isinstance(error, ToolError):
                raise
            raise ToolError(f"{type(error).__name__}: {error}") from None
        return str(
            int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value
        )


def _evaluate(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) * len(str(left)) > _MAX_DIGITS:
            raise ToolError("the power is too large")
        value = _OPERATORS[type(node.op)](left, right)
        if isinstance(value, complex) or (isinstance(value, int) and value.bit_length() > 4 * _MAX_DIGITS):
            raise ToolError("the result is too large, or no real number")
        return value
    raise ToolError("only numbers, + - * / // % ** and brackets are allowed")


class PythonTool:
    """Runs a program and returns its output."""

    name = "python"
    schema = describe(name, "Runs a Python program and returns what it prints.", code="the program")

    def __init__(self, timeout_seconds: float, field: str) -> None:
        self._isolation = sandbox.choose("auto", field)
        self.note = f"python tool: programs run in a sandbox ({sandbox.describe(self._isolation)})"
        self._limits = Limits(wall_seconds=timeout_seconds, output_bytes=4096)

    def run(self, arguments: dict[str, Any]) -> str:
        """See Tool."""
        program = sandbox.Program({"main.py": text_argument(arguments, "code")})
        done = sandbox.run(program, self._limits, self._isolation)
        text = done.stdout.decode(errors="replace")
        if done.outcome != "exited":
            return f"{text}\n(ended: {done.outcome})".strip()
        errors = done.stderr.decode(errors="replace").strip().splitlines()
        return (
            f"{text}\n{errors[-1]}".strip() if done.code and errors else text.strip() or "(nothing printed)"
        )


class Search:
    """Search for documents: BM25 (Robertson and Zaragoza 2009), in rank-bm25's Okapi form."""

    name = "search"
    note = ""
    schema = describe(name, "Finds documents.", query="words to look for")

    def __init__(self, path: str, num_results: int, field: str) -> None:
        from rank_bm25 import BM25Okapi

        self._num_results = num_results
        self._documents = read_documents(path, field)
        self._index = BM25Okapi([words_of(document) for document in self._documents])

    def run(self, arguments: dict[str, Any]) -> str:
        """Return the best documents; those without a word of the query are excluded."""
        words = set(words_of(text_argument(arguments, "query")))
        scores = self._index.get_scores(sorted(words))
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        found = [i for i in order if words & set(words_of(self._documents[i]))][: self._num_results]
        return "\n\n".join(f"[{i + 1}] {self._documents[i]}" for i in found) or "nothing found"


def words_of(text: str) -> list[str]:
    """Return the lower-case words, in order."""
    return _WORD.findall(text.lower())


def read_documents(path: str, field: str) -> list[str]:
    """Read a JSONL file: ``text``, after ``title`` if there is one. UserError with the line."""
    documents = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{field}: cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            title = f"{row['title']}: " if row.get("title") else ""
            documents.append(title + row["text"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{field}: {path}:{number}: not {{"text": ...}}: {error}') from error
    if not any(words_of(document) for document in documents):
        raise UserError(f"{field}: {path} has no documents with words")
    return documents


_CLASSES: dict[str, type[Calculator] | type[PythonTool] | type[Search]] = {
    kind.name: kind for kind in (Calculator, PythonTool, Search)
}


def schemas(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the JSON schemas of these tools."""
    return [_CLASSES[name].schema for name in names]


def make_tools(config: ToolsConfig, field: str) -> list[Tool]:
    """Build the tools of a configuration, in order."""
    made: list[Tool] = []
    for name in config.tools:
        if name == "calculator":
            made.append(Calculator())
        elif name == "python":
            made.append(PythonTool(config.python_timeout_seconds, f"{field}.tools"))
        else:
            assert config.corpus is not None, "a rule requires it"
            made.append(Search(config.corpus, config.num_results, f"{field}.corpus"))
    return made
