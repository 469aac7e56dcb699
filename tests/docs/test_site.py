"""The documentation is whole: links work, generated pages are up to date, every metric is explained."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from megarl.jobs import JOBS
from megarl.metrics.timers import PHASES
from tools import make_cli_docs
from tools.run_guides import fences, pages

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def slug(heading: str) -> str:
    """As code hosts make anchors of headings."""
    text = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower())
    return text.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = without_code(page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {slug(each) for each in headings} | set(re.findall(r'<a id="([^"]+)"></a>', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"^[\w/-]+$", (DOCS / "index.md").read_text(), re.MULTILINE))
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")}
    assert pages - listed == {"index", "guides/README"}
    assert listed <= pages


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help by version")
def test_the_command_lines_page_is_its_help() -> None:
    assert (DOCS / "cli.md").read_text() == make_cli_docs.page(), "run python tools/make_cli_docs.py"


def test_the_glossary_has_every_metric_that_is_shown() -> None:
    page = (DOCS / "metrics.md").read_text()
    shown = {name for job in JOBS.values() for column in job.columns for name in column.sources}
    shown |= {f"seconds_{phase}" for phase in PHASES}
    explained = set(re.findall(r"`([a-z_]+)`", page))
    assert shown - {"step", "tokens_per_second"} <= explained


def test_every_fenced_block_says_what_it_is() -> None:
    known = {"bash", "yaml", "json", "python", "text", "{eval-rst}"}
    for page, path in pages().items():
        for language, block in fences(path.read_text()):
            assert language in known, f"{page}: a block of language {language!r}: {block[:40]!r}"


def test_messages_and_the_rows_that_explain_them_belong_together() -> None:
    rows = set(re.findall(r'<a id="([^"]+)"></a>', (DOCS / "troubleshooting.md").read_text()))
    sources = [path.read_text() for path in (ROOT / "megarl").rglob("*.py")]
    referred = {row for text in sources for row in re.findall(r"""\bsee\(["']([a-z-]+)["']\)""", text)}
    assert rows == referred and len(rows) >= 7
