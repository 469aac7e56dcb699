"""megatron-core on a GPU: one GPU per rank, and torch kernels that suit packed sequences."""

from __future__ import annotations

import torch


def install(device: torch.device) -> None:
    """Make ``device`` this process's GPU. Called by :func:`megarl.platform.install`, once."""
    torch.cuda.set_device(device)
    # cuDNN's attention builds a plan for every new shape, and packed microbatches have unlimited shapes.
    torch.backends.cuda.enable_cudnn_sdp(False)
