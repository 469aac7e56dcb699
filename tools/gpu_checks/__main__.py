"""``python -m gpu_checks STEP --out DIR [--wheels DIR] [--quick]``: one step of tools/gpu_check.py."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

from gpu_checks.report import EXIT_SKIPPED, Report, SkipStep


def main() -> int:
    """Run the step; return 0, 1 for a problem, EXIT_SKIPPED if it cannot run here."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--quick", action="store_true")
    parsed = parser.parse_args()
    report = Report(parsed.out, parsed.wheels, quick=parsed.quick)
    try:
        importlib.import_module(f"gpu_checks.{parsed.step}").run(report)
    except SkipStep as reason:
        report.summary(str(reason))
        return EXIT_SKIPPED
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        report.problem(f"{type(error).__name__}: {text[:300]}")
    return int(report.num_problems > 0)


if __name__ == "__main__":
    sys.exit(main())
