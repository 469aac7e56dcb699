"""Run the command blocks of the documentation, and report each one's time.

python tools/run_guides.py            all pages
python tools/run_guides.py eval sft   some of them
python tools/run_guides.py --list     show the commands, and why some are not run here

Command blocks are fenced as ```bash. An output that the page prints is compared in kind with the command's
(tools/doc_outputs.py). Exit code 1 if one differs, or if a command fails or takes longer than the 5 minutes
that guides promise (--limit). Output goes to runs/guides/NAME.log. ELSEWHERE names the blocks that are not
run here.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

if __package__ in (None, ""):  # run as a program
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.doc_outputs import difference, outputs

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)

QUICKSTART = "`make nightly` runs the quickstart and all tests before the guides"
LONG = "as long as the quickstart, which it follows; tests/docs resolves its configuration"
ELSEWHERE = {
    ("README", "make quickstart"): QUICKSTART,
    ("index", "make quickstart"): QUICKSTART,
    ("quickstart", "make quickstart"): QUICKSTART,
    ("installation", "apt-get"): "needs root; tests/tools/test_setup.py runs the set-up",
    ("installation", "MEGARL_CUDA=1"): "needs nvcc; `make nightly` has make cuda-env-check",
    ("installation", "pip install torch"): "downloads torch; tests/package builds and installs the wheel",
    ("installation", "megarl doctor"): QUICKSTART,
    ("docker", "docker build"): "needs Docker; tests/tools/test_deployment.py reads the Dockerfiles",
    ("workstation", "make setup"): "activates the environment of an interactive shell",
    ("workstation", "tmux"): "starts a run in the background, on data of one's own",
    ("backends", "megarl sft"): LONG,
    ("checkpoints", "megarl grpo"): LONG,
    ("configuration", "megarl grpo"): LONG,
    ("configuration/*", "megarl"): LONG,
    ("use-cases/mathematics", "megarl eval"): "the command of guides/eval",
    ("use-cases/mathematics", "megarl grpo"): "needs the hub; tests/docs resolves its configuration",
    ("models", ".venv/bin/python -m pytest"): QUICKSTART,
    ("security", "export RAY_AUTH_MODE"): "starts a cluster on several hosts; tests/cluster has one host's",
}
"""(page, beginning of the block) -> where its commands are checked instead, or why they cannot be."""


def fences(text: str) -> list[tuple[str, str]]:
    """Return language and content of every fenced block of a page."""
    return _FENCE.findall(text)


def pages() -> dict[str, Path]:
    """Return name -> page: README, and the pages of docs/ by their path without .md."""
    found = {str(path.relative_to(DOCS).with_suffix("")): path for path in sorted(DOCS.rglob("*.md"))}
    return {"README": ROOT / "README.md", **found}


def applies(key: tuple[str, str], page: str, block: str) -> bool:
    """Return whether a key of ELSEWHERE is about this block."""
    return fnmatch(page, key[0]) and block.startswith(key[1])


def reason_elsewhere(page: str, block: str) -> str | None:
    """Return why a block is not run here; None if it is."""
    return next((reason for key, reason in ELSEWHERE.items() if applies(key, page, block)), None)


def blocks(names: list[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yield (page, block) of every command block, of these pages if any are named."""
    for page, path in pages().items():
        if not names or page in names:
            for language, block in fences(path.read_text(encoding="utf-8")):
                if language == "bash":
                    yield page, block


def run(command: str, log: Path, limit: float) -> tuple[str, float]:
    """Return "ok" or the failure, and the seconds; end the command after ``limit``."""
    started = time.monotonic()
    environ = {**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"}
    with log.open("a") as stream:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=ROOT,
            env=environ,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return f"still running after {limit:.0f} s", time.monotonic() - started
    return "ok" if code == 0 else f"exit code {code}", time.monotonic() - started


def named_outputs(names: list[str] | None = None) -> Iterator[tuple[str, str, str]]:
    """Yield (page, command, output) of every output whose command a comment names."""
    for page, path in pages().items():
        if not names or page in names:
            for each in outputs(path.read_text(encoding="utf-8")):
                if not each.follows:
                    yield page, each.command, each.text


def _compared(page: str, command: str, said: str) -> str:
    """Return "ok", or how the page's output of this block differs from what it says."""
    for each in outputs(pages()[page].read_text(encoding="utf-8")):
        if each.follows and each.command == command and (other := difference(each.text, said)):
            return f"output: {other.splitlines()[0]}"
    return "ok"


def main() -> int:
    """Run the requested pages' blocks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="pages, without .md; guides without their folder too")
    parser.add_argument("--list", action="store_true", help="show the commands, run nothing")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each block")
    options = parser.parse_args()
    there = dict.fromkeys(page for page, _ in blocks())
    names = [f"guides/{name}" if f"guides/{name}" in there else name for name in options.names]
    if unknown := set(names) - set(there):
        sys.exit(f"no commands in {', '.join(sorted(unknown))}; pages are {', '.join(there)}")
    logs = ROOT / "runs" / "guides"
    logs.mkdir(parents=True, exist_ok=True)
    failed = 0
    started: set[Path] = set()
    for page, command in blocks(names):
        if (reason := reason_elsewhere(page, command)) is not None:
            print(f"{page:24} not here: {reason}", flush=True)
            continue
        if options.list:
            print(f"{page}:\n{command}")
            continue
        log = logs / f"{page.replace('/', '-')}.log"
        if log not in started:
            log.unlink(missing_ok=True)
            started.add(log)
        begun = log.stat().st_size if log.exists() else 0
        outcome, seconds = run(command, log, options.limit)
        if outcome == "ok":
            said = log.read_bytes()[begun:].decode(errors="replace")
            outcome = _compared(page, command, said)
        failed += outcome != "ok"
        told = outcome if outcome == "ok" else f"{outcome}: see {log}"
        print(f"{page:24} {seconds:6.0f} s  {told}", flush=True)
    if not options.list:  # after the blocks, whose runs they may read
        failed += _run_named(names, logs, options.limit)
    return 1 if failed else 0


def _run_named(names: list[str], logs: Path, limit: float) -> int:
    """Run the commands that comments above outputs name; return how many outputs differ."""
    failed = 0
    for page, command, text in named_outputs(names):
        log = logs / f"{page.replace('/', '-')}-output.log"
        log.unlink(missing_ok=True)
        run(command, log, limit)  # an output may be that of a refusal
        other = difference(text, log.read_text(errors="replace"))
        failed += other is not None
        print(f"{page:24} output of {command}: {'ok' if other is None else other}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
