"""Benchmarks of MegaRL; run one with ``python -m benchmarks NAME --json FILE``."""
