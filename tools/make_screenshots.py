"""Make the pictures of the documentation, docs/images/*.webp, from two recorded runs.

Run it in the project's directory: ``make screenshots``, or ``python -m tools.make_screenshots``. The
runs are made first if they are not there: the quickstart's GRPO on two ranks, and once more with a smaller
learning rate. They begin with the quickstart's SFT model (``--start``), so run ``make quickstart`` before;
both take a few minutes on two cores. Needs chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megarl.metrics.report import write_comparison, write_report
from tools.browser import Browser, is_installed

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
RUNS = {
    "two-ranks": ["parallel.num_processes=2"],
    "lr-2e-5": ["parallel.num_processes=2", "optimizer.lr=2e-5"],
}
_WIDTH = 1200
_CONSOLE_LINES = 26
_BAR_STAYS = "document.querySelectorAll('.top').forEach((bar) => { bar.style.position = 'static'; })"


def _report(runs: Path) -> Path:
    return write_report(runs / "two-ranks")


def _comparison(runs: Path) -> Path:
    return write_comparison([runs / name for name in RUNS])


def _console(runs: Path) -> Path:
    """Return a page with the last lines of console.log, as a terminal shows them."""
    lines = (runs / "two-ranks" / "console.log").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("step "))
    console = Console(record=True, width=132, file=io.StringIO())  # recorded, not shown
    command = "$ megarl grpo -c configs/quickstart_grpo.yaml parallel.num_processes=2"
    console.print(Text(command, style="bold"))
    for line in lines[start : start + _CONSOLE_LINES]:
        console.print(Text(line))
    page = runs / "console.html"
    style = "<style>body { padding: 14px 18px; } pre { margin: 0; font-size: 14px !important; }</style>"
    page.write_text(console.export_html(inline_styles=True).replace("</head>", f"{style}</head>"))
    return page


def _tokens(browser: Browser) -> None:
    """Show the longest response by how much trainer and engine differ on its tokens."""
    browser.choose("select[aria-label=Step]", "10")
    browser.choose("select[aria-label=Sort]", "length, longest first")
    browser.click(".list .row")
    browser.choose('select[aria-label="Show tokens by"]', "trainer − engine")
    browser.click(".token:nth-child(2)")


def _slowest(browser: Browser) -> None:
    browser.click_button("Slowest step")
    browser.click(".marked-row")


def _nothing(browser: Browser) -> None:
    pass


# name -> (page, what is done there, first and last element of the picture)
Picture = tuple[Callable[[Path], Path], Callable[[Browser], None], str, str]
PICTURES: dict[str, Picture] = {
    "report.webp": (_report, _nothing, "body", ".figures"),
    "curves.webp": (_report, _nothing, "#charts", "details.section"),
    "samples.webp": (_report, _tokens, "#samples", ".browser"),
    "timeline.webp": (_report, _slowest, "#timeline", "#rank-timeline"),
    "compare.webp": (_comparison, _nothing, "#charts", "details.section"),
    "console.webp": (_console, _nothing, "body", "pre"),
}
"""The pictures of the documentation, by their names in docs/images."""


def make_runs(runs: Path, start: Path) -> None:
    """Make, or go on with, the runs that are not complete."""
    for name, settings in RUNS.items():
        if (runs / name / "summary.json").exists():
            continue
        command = [sys.executable, "-m", "megarl.cli", "grpo", "--config", "configs/quickstart_grpo.yaml"]
        command += [f"run.dir={runs / name}", f"model.path={start}", *settings]
        subprocess.run(command, check=True)


def make_pictures(runs: Path, target: Path) -> None:
    """Write every picture of :data:`PICTURES` into ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder), width=_WIDTH, height=900) as browser:
        browser.devtools("Emulation.setScrollbarsHidden", hidden=True)
        for name, (page, prepare, first, last) in PICTURES.items():
            browser.open(page(runs).resolve().as_uri())
            prepare(browser)
            browser.run(_BAR_STAYS)
            browser.picture(target / name, first, last)
            print(f"{target / name}: {(target / name).stat().st_size / 1024:.0f} KiB")


def main() -> int:
    """Make the runs and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/screenshots"), help="directory of the runs")
    parser.add_argument("--start", type=Path, default=Path("runs/quickstart/sft/hf"), help="SFT model")
    parser.add_argument("--output", type=Path, default=IMAGES, help="directory of the pictures")
    arguments = parser.parse_args()
    if not is_installed():
        print("error: chromium and chromedriver are not on the PATH", file=sys.stderr)
        return 2
    make_runs(arguments.runs, arguments.start)
    make_pictures(arguments.runs, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
