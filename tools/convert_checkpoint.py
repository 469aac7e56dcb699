"""`megarl convert` for scripts: python tools/convert_checkpoint.py hf-to-megatron SOURCE TARGET."""

from __future__ import annotations

import sys

from megarl.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
