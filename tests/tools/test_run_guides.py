"""Every command block is run or has its reason not to be, every guide has one, and outcomes are reported."""

from __future__ import annotations

import re
from pathlib import Path

from tools.run_guides import DOCS, ELSEWHERE, applies, blocks, fences, reason_elsewhere, run

GUIDES = DOCS / "guides"


def test_every_guide_ends_in_a_command_that_is_run_and_the_index_leads_to_guides() -> None:
    for path in GUIDES.glob("*.md"):
        if path.stem != "README":
            language, block = fences(path.read_text())[-1]
            assert language == "bash" and reason_elsewhere(f"guides/{path.stem}", block) is None, path
    for name in re.findall(r"\]\(([^)]*)\)", (GUIDES / "README.md").read_text()):
        assert (GUIDES / name).is_file(), f"docs/guides/README.md links to {name}"


def test_the_table_of_blocks_that_are_not_run_has_no_stale_line() -> None:
    for key in ELSEWHERE:
        assert any(applies(key, page, block) for page, block in blocks()), key


def test_fences() -> None:
    text = "a\n```bash\nfirst\n```\nb\n```yaml\na: 1\n```\n```bash\nsecond \\\n  more\n```\nend\n"
    assert fences(text) == [("bash", "first\n"), ("yaml", "a: 1\n"), ("bash", "second \\\n  more\n")]
    assert fences("words") == []


def test_outcomes(tmp_path: Path) -> None:
    assert run("echo out; echo err >&2", tmp_path / "log", 20)[0] == "ok"
    assert (tmp_path / "log").read_text().split() == ["out", "err"]
    assert run("false\ntrue", tmp_path / "log", 20)[0] == "exit code 1"
    outcome, seconds = run("sleep 60", tmp_path / "log", 0.3)
    assert outcome == "still running after 0 s"
    assert seconds < 20
