"""The configuration's pages match the schema, and the schema documents every field."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megarl.config.introspect import sections_of, walk
from megarl.config.section import Section
from megarl.jobs import roots
from tools import make_config_docs

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "configuration"


def test_pages_are_up_to_date() -> None:
    assert make_config_docs.differing() == [], "run python tools/make_config_docs.py"


@pytest.mark.parametrize("command", roots())
def test_the_page_of_a_command_and_the_shared_ones_name_its_settings(command: str) -> None:
    texts = [(PAGES / f"{name}.md").read_text() for name in (command, *make_config_docs.SHARED)]
    for path, field in walk(roots()[command]).items():
        assert any(f"| `{path[-1]}` |" in text or f"[`{path[-1]}`](" in text for text in texts), path
        assert field.description or sections_of(field.annotation), path


def test_a_rule_without_a_sentence_is_found() -> None:
    class Silent(Section):
        """A section."""

        def _nothing(self) -> None: ...

        _nothing.is_rule = True  # type: ignore[attr-defined]

    with pytest.raises(AssertionError, match="_nothing"):
        make_config_docs._rules(Silent)


def test_the_page_of_backends_has_the_tables_of_the_code():
    command = [sys.executable, "tools/make_backend_docs.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 0, "run tools/make_backend_docs.py"
