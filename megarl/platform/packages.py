"""Check options that need an optional package or a GPU, before anything starts."""

from __future__ import annotations

from importlib.util import find_spec

from megarl.config.parallel import ParallelConfig
from megarl.errors import UserError
from megarl.platform import chosen_name

_RING = "parallel.context_attention: ring"


def check_packages(parallel: ParallelConfig) -> None:
    """Check that this machine supports the options of ``parallel``.

    Raises:
        UserError: an option needs a GPU or Transformer Engine. All other options work without them.
    """
    if parallel.context_attention != "ring":
        return
    if chosen_name() != "cuda":
        raise UserError(f"{_RING} uses Transformer Engine and needs a GPU; all_gather works on any device")
    if find_spec("transformer_engine") is None:
        raise UserError(f"{_RING} needs the package transformer-engine; all_gather works without")
