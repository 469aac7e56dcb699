from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="session")
def tokenizer():
    """The quickstart's tokenizer, as the tool builds it."""
    spec = importlib.util.spec_from_file_location("make_tiny_model", TOOLS / "make_tiny_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tiny_model"] = module
    spec.loader.exec_module(module)
    return module.make_tokenizer()


@pytest.fixture
def jsonl(tmp_path):
    """Write lines to a file; return its path."""

    def write(*lines: str, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write
