"""What context-parallel ranks do in tests."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from megarl.losses.sft import sft_loss
from megarl.packing.context_parallel import zigzag_indices
from megarl.records import Sequence
from tests.trainer import ranks


def attention(
    context: Any, tensors: list[np.ndarray], lengths: list[int], prefixes: Any, scale: float
) -> tuple[np.ndarray, list[np.ndarray]]:
    """This rank's tokens, and their part of: the output, and the gradients of q, k and v."""
    from megatron.core import parallel_state

    from megarl.trainer.megatron.context_attention import context_parallel_attention

    group = parallel_state.get_context_parallel_group()
    rows = zigzag_indices(torch.tensor([0, *accumulate(lengths)]), group.rank(), group.size())
    q, k, v, grad = (torch.from_numpy(x)[rows] for x in tensors)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = context_parallel_attention(*inputs, lengths, prefixes, scale, group)
    out.backward(grad)
    return rows.numpy(), [x.numpy() for x in (out.detach(), *(x.grad for x in inputs))]


def long_step(context: Any, model_dir: str, longest: int) -> dict[str, Any]:
    """One SFT step on a long sequence and short ones, and the most memory it held at once."""
    draw = random.Random(7)
    sequences = []
    for length in (longest, 3000, 1000, 96):
        tokens = [draw.randrange(250) for _ in range(length)]
        sequences.append(Sequence(tokens, [0] * 8 + [1] * (length - 8)))
    total = sum(len(s.token_ids) for s in sequences)
    policy = ranks.build(context, model_dir, optimizer={"lr_warmup_steps": 0}, budget=total + 64)
    small = [Sequence(list(range(16)), [0] + [1] * 15)]
    policy.train_step(policy.prepare(small, "token"), sft_loss, temperature=1.0)  # the optimizer's state
    batches = policy.prepare(sequences, "token")
    assert len(batches) == 1
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = policy.train_step(batches, sft_loss, temperature=1.0)
    assert profile.profiler is not None
    kineto = profile.profiler.kineto_results
    assert kineto is not None
    events = [event for event in kineto.events() if event.name() == "[memory]"]
    current = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak, largest = max(peak, current), max(largest, event.nbytes())
    return {
        "metrics": result.metrics,
        "tokens": batches[0].token_ids.shape[0],
        "peak_bytes": peak,
        "largest_tensor": largest,
    }
