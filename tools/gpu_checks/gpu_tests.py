"""Run the tests marked gpu: every op against its CPU version, memory shared between processes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from gpu_checks.report import Report, SkipStep

ROOT = Path(__file__).resolve().parents[2]
MARKS = ("mark.gpu",)


def files() -> list[str]:
    """Return the files with such tests; the others import packages that may be missing."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path.parts[-2] != "fake_cuda" and any(mark in path.read_text() for mark in MARKS):
            found.append(str(path.relative_to(ROOT)))
    return found


def run(report: Report) -> None:
    """Report counts as they come, and the name of each failing test."""
    for name in ("pytest", "pytest_timeout"):
        if find_spec(name) is None:
            raise SkipStep(f"{name} is not installed")
    counts = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--durations=10", "--tb=short"]
    # Of the installed plugins, load only the one that the configuration needs.
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command += [
        "-p",
        "pytest_timeout",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        *(["-x"] if report.quick else []),
        *files(),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(line)
        name, _, rest = line.partition(" ")
        verdict = rest.split(" ", 1)[0].strip()
        if "::" not in name or verdict not in counts:
            continue
        counts[verdict] += 1
        if verdict in ("FAILED", "ERROR"):
            report.problem(name)
        if sum(counts.values()) % 10 == 1:
            report.figure("tests", counts)
    code = process.wait()
    report.figure("tests", counts)
    report.summary(f"{counts['PASSED']} passed, {counts['FAILED'] + counts['ERROR']} failed")
    report.check(code == 0, f"pytest ended with {code}")
    report.check(counts["PASSED"] > 0, "no test ran")
