"""Short names of dtypes, for settings and command-line options alike; imports nothing."""

from __future__ import annotations

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp8": "float8"}


def full_dtype(name: str) -> str:
    """Return the full name of a dtype: bf16 and torch.bfloat16 are bfloat16; other texts unchanged."""
    return _SHORT.get(plain := name.removeprefix("torch."), plain)
