"""Every guide ends in a command, the index's links lead somewhere, and a command's outcome is reported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.run_guides import GUIDES, last_command, run


def test_every_guide_ends_in_a_command_and_the_index_leads_to_guides() -> None:
    for path in GUIDES.glob("*.md"):
        if path.stem != "README":
            assert last_command(path.read_text()).strip(), path
    for name in re.findall(r"\]\(([^)]*)\)", (GUIDES / "README.md").read_text()):
        assert (GUIDES / name).is_file(), f"docs/guides/README.md links to {name}"


def test_the_last_block_counts() -> None:
    assert (
        last_command("a\n```\nfirst\n```\nb\n```bash\nsecond \\\n  more\n```\nend\n") == "second \\\n  more\n"
    )
    with pytest.raises(ValueError, match="yaml"):
        last_command("```\nfirst\n```\n```yaml\na: 1\n```\n")
    with pytest.raises(ValueError, match="no command"):
        last_command("words")


def test_outcomes(tmp_path: Path) -> None:
    assert run("echo out; echo err >&2", tmp_path / "log", 20)[0] == "ok"
    assert (tmp_path / "log").read_text().split() == ["out", "err"]
    assert run("false\ntrue", tmp_path / "log", 20)[0] == "exit code 1"
    outcome, seconds = run("sleep 60", tmp_path / "log", 0.3)
    assert outcome == "still running after 0 s"
    assert seconds < 20
