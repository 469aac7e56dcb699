"""megatron-core on a GPU: one card per rank, and torch's kernels chosen for packed sequences."""

from __future__ import annotations

import torch


def install(device: torch.device) -> None:
    """Make ``device`` this process's card. Called by :func:`megarl.platform.install`, once."""
    torch.cuda.set_device(device)
    # cuDNN's attention builds a plan for every new shape, of which packed microbatches have no end.
    torch.backends.cuda.enable_cudnn_sdp(False)
