"""Run the last command block of every guide in docs/guides/, and report each one's time.

python tools/run_guides.py            all guides
python tools/run_guides.py eval sft   some of them
python tools/run_guides.py --list     show the commands

Exit code 1 if one fails or takes longer than 5 minutes, which the guides promise (--limit).
Output goes to runs/guides/NAME.log.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ROOT / "docs" / "guides"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def last_command(text: str) -> str:
    """Return the last fenced block of a page; ValueError if there is none, or its language is another."""
    blocks = _BLOCK.findall(text)
    if not blocks:
        raise ValueError("no command block")
    language, command = blocks[-1]
    if language not in ("", "bash", "sh", "console"):
        raise ValueError(f"the last block is {language}, not a command")
    return str(command)


def run(command: str, log: Path, limit: float) -> tuple[str, float]:
    """Return "ok" or the failure, and the seconds; end the command after ``limit``."""
    started = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=ROOT,
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


def main() -> int:
    """Run the requested guides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="guides, without .md")
    parser.add_argument("--list", action="store_true", help="show the commands, run nothing")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each")
    options = parser.parse_args()
    there = sorted(path.stem for path in GUIDES.glob("*.md") if path.stem != "README")
    if unknown := set(options.names) - set(there):
        sys.exit(f"no guide {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    logs = ROOT / "runs" / "guides"
    logs.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in options.names or there:
        try:
            command = last_command((GUIDES / f"{name}.md").read_text())
        except ValueError as error:
            print(f"{name:15} {error}", flush=True)
            failed += 1
            continue
        if options.list:
            print(f"{name}:\n{command}")
            continue
        log = logs / f"{name}.log"
        outcome, seconds = run(command, log, options.limit)
        failed += outcome != "ok"
        print(
            f"{name:15} {seconds:6.0f} s  {outcome if outcome == 'ok' else f'{outcome}: see {log}'}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
