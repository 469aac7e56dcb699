"""docs/configuration.md matches the schema, and the schema documents every field."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megarl.config.introspect import sections_of, walk
from megarl.jobs import roots

ROOT = Path(__file__).resolve().parents[2]


def test_page_is_up_to_date() -> None:
    command = [sys.executable, "tools/make_config_docs.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_page_names_every_setting() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for root in roots().values():
        for path, field in walk(root).items():
            assert f"`{path[-1]}`" in page, path
            assert field.description or sections_of(field.annotation), path


def test_the_page_of_backends_has_the_tables_of_the_code():
    command = [sys.executable, "tools/make_backend_docs.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 0, "run tools/make_backend_docs.py"
