"""Draws one token per row of logits, from a uniform number that depends on the request and the position only.

A token is where the cumulative probability passes that number (inverse transform sampling). So what is drawn
beside a request never changes its noise, and a request that is computed again draws the same tokens; what
remains is rounding of the logits, which moves a boundary between two tokens by about 1e-7.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from megarl.inference.interface import SamplingConfig
from megarl.ops.support import support_min_logit

_BLOCK = 256  # tokens whose probabilities are added up before the cumulative sum is looked at one by one
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) for each (seed, position of the token in its response), [B] float64.

    Two rounds of SplitMix64's finalizer (Steele et al. 2014); the upper 53 bits make the number.
    """
    state = np.array([seed % 2**64 for seed in seeds], np.uint64)
    with np.errstate(over="ignore"):
        state = _mix(state + _GOLDEN)
        state = _mix(state ^ (np.array(positions, np.uint64) + np.uint64(1)) * _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def draw(
    logits: torch.Tensor, sampling: SamplingConfig, noise: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample logits [B, V] with noise [B] from :func:`uniforms`: token ids [B] int64, logprobs [B] float32.

    Logprobs are those of the distribution that was drawn from: after temperature, top-k and top-p, over the
    kept tokens; greedy ones (temperature 0, which ignores top-k and top-p) of the logits as they are.
    Logits equal to the smallest kept one are kept, as in the trainer's logprobs (megarl.ops.support).
    """
    logits = logits.float()
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    if sampling.top_k or sampling.top_p < 1:
        smallest = support_min_logit(
            logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
        )
        logits = logits.masked_fill(logits < smallest[:, None], -torch.inf)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    return _invert(logits, torch.from_numpy(noise).to(logits.device))


def _invert(logits: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token at which the cumulative probability exceeds noise [B], and its logprob."""
    weights = logits.softmax(-1)  # up to rounding: `total` has what they add up to
    padded = functional.pad(weights, (0, -logits.shape[1] % _BLOCK)) if logits.shape[1] % _BLOCK else weights
    blocks = padded.view(len(weights), -1, _BLOCK)
    upto = blocks.sum(-1).double().cumsum(-1)  # [B, V / _BLOCK]
    total = upto[:, -1:]
    target = torch.minimum(noise[:, None] * total, total.nextafter(torch.zeros_like(total)))
    block = torch.searchsorted(upto, target, right=True).clamp_(max=upto.shape[1] - 1)  # NaN goes beyond
    before = torch.where(block > 0, upto.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].double()
    place = torch.searchsorted(inside.cumsum(-1), target - before, right=True)
    # The block's sum may be rounded up beyond that of its tokens: the last one there that can be drawn.
    last = ((inside > 0) * torch.arange(_BLOCK, device=logits.device)).amax(-1, keepdim=True)
    tokens = block * _BLOCK + torch.minimum(place, last)
    tokens.clamp_(max=logits.shape[1] - 1)  # logits that are not numbers
    logprobs = weights.gather(-1, tokens).double().log() - total.log()
    return tokens[:, 0], logprobs[:, 0].float()
