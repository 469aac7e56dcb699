"""``python -m benchmarks NAME ...`` runs ``main(arguments)`` of benchmarks/NAME.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

SHARED = ("common", "loss_ops", "peers", "process_tree", "trainers")
NAMES = sorted(
    path.stem
    for path in Path(__file__).parent.glob("[a-z]*.py")
    if path.stem not in SHARED and not path.stem.endswith(("_trainer", "_trainers"))
)

if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
    sys.exit(f"usage: python -m benchmarks {{{','.join(NAMES)}}} --json FILE [--quick]")
importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
