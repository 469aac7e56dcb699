"""``python -m megarl``, the entry point under srun and torchrun."""

from __future__ import annotations

import sys

from megarl.cli import main

if __name__ == "__main__":
    sys.exit(main())
