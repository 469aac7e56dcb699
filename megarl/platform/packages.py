"""Options that need a package, or a GPU, that a machine may lack: told in one line before anything starts."""

from __future__ import annotations

from importlib.util import find_spec

from megarl.config.parallel import ParallelConfig
from megarl.errors import UserError
from megarl.platform import chosen_name

_RING = "parallel.context_attention: ring"


def check_packages(parallel: ParallelConfig) -> None:
    """Whether the trainer's ranks can have what ``parallel`` asks for on this machine.

    Raises:
        UserError: no GPU or no Transformer Engine for an option of its own. Everything else does without.
    """
    if parallel.context_attention != "ring":
        return
    if chosen_name() != "cuda":
        raise UserError(f"{_RING} is Transformer Engine's and needs a GPU; all_gather works on any device")
    if find_spec("transformer_engine") is None:
        raise UserError(f"{_RING} needs the package transformer-engine; all_gather does without")
