"""Functions run by context-parallel ranks in tests."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from benchmarks.common import allocations
from megarl.batching.context_parallel import zigzag_indices
from megarl.losses.sft import sft_loss
from megarl.records import TokenSequence
from megarl.trainer.passes import train_step
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
        sequences.append(TokenSequence(tokens, [0] * 8 + [1] * (length - 8)))
    total = sum(map(len, sequences))
    policy = ranks.build(context, model_dir, optimizer={"lr_warmup_steps": 0}, budget=total + 64)
    small = [TokenSequence(list(range(16)), [0] + [1] * 15)]
    train_step(
        policy, ranks.prepare(policy, small, "token").batches, sft_loss, temperature=1.0
    )  # the optimizer's state
    batches = ranks.prepare(policy, sequences, "token").batches
    assert len(batches) == 1
    result, sizes = allocations(lambda: train_step(policy, batches, sft_loss, temperature=1.0))
    return {
        "metrics": result.metrics,
        "tokens": batches[0].token_ids.shape[0],
        "peak_bytes": max(accumulate(sizes, initial=0)),
        "largest_tensor": max(sizes),
    }


class Ring(torch.nn.Module):
    """Stands in for Megatron's wrapper of Transformer Engine's attention, with its arguments and conventions.

    Each sequence of cu_seqlens_q_padded lies in 2n chunks, of which rank r has r and 2n - 1 - r; the result
    has heads and their width in one dimension. One softmax over a full mask.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float,
        cp_comm_type: str,
        pg_collection: Any,
    ) -> None:
        super().__init__()
        assert (attn_mask_type.name, attention_type, cp_comm_type) == ("padding_causal", "self", "p2p")
        self.scale, self.group = softmax_scale, pg_collection.cp

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        kind: Any,
        *,
        packed_seq_params: Any,
    ) -> torch.Tensor:
        from torch.distributed.nn.functional import all_gather

        assert (mask, kind.name, packed_seq_params.qkv_format) == (None, "padding_causal", "thd")
        if packed_seq_params.cp_group is not None:  # as the wrapper does, it keeps what it was last told
            assert packed_seq_params.local_cp_size == packed_seq_params.cp_group.size()
            self.group = packed_seq_params.cp_group
        elif packed_seq_params.local_cp_size is not None:
            assert packed_seq_params.local_cp_size == 1
            self.group = None
        bounds = packed_seq_params.cu_seqlens_q_padded.tolist()
        assert packed_seq_params.max_seqlen_q == max(b - a for a, b in pairwise(bounds))
        size, rank = (self.group.size(), self.group.rank()) if self.group is not None else (1, 0)
        where: list[list[int]] = [[] for _ in range(size)]
        for start, stop in pairwise(bounds):
            if size == 1:
                where[0] += range(start, stop)
                continue
            chunk = (stop - start) // (2 * size)
            for r in range(size):
                for number in (r, 2 * size - 1 - r):
                    where[r] += range(start + number * chunk, start + (number + 1) * chunk)
        order = torch.tensor([token for rows in where for token in rows])
        keys, values = k, v
        if self.group is not None:
            keys, values = (torch.cat(all_gather(x.contiguous(), self.group)) for x in (k, v))
        keys, values = (x[order.argsort()] for x in (keys, values))
        of = torch.bucketize(torch.arange(bounds[-1]), torch.tensor(bounds[1:]), right=True)
        rows = torch.tensor(where[rank])
        seen = (of[rows, None] == of) & (torch.arange(bounds[-1]) <= rows[:, None])
        repeat = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(repeat, dim=1).transpose(0, 1) for x in (keys, values))
        scores = (q.transpose(0, 1) @ keys.mT * self.scale).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)


def build(context: Any, model_dir: str) -> Any:
    """A policy without shared prefixes, which a ring does not have."""
    policy = ranks.build(context, model_dir, optimizer={"lr_warmup_steps": 0})
    policy.batch_maker.packing = policy.batch_maker.packing.model_copy(update={"share_prefix": "off"})
    return policy


def train(context: Any, model_dir: str) -> list[list[float]]:
    """Loss and gradient norm of three steps on packed sequences; a ring is that of the class above."""
    from unittest.mock import patch

    module = "megatron.core.extensions.transformer_engine.TEDotProductAttention"
    with patch(module, Ring), patch("megarl.trainer.megatron.trainer.check_packages"):
        policy = build(context, model_dir)
    rings = [m for chunk in policy.chunks for m in chunk.modules() if isinstance(m, Ring)]
    assert bool(rings) == (context.parallel.context_attention == "ring")
    found = []
    for step in range(3):
        batches = ranks.prepare(policy, ranks.make_sequences(step), "token").batches
        metrics = train_step(policy, batches, sft_loss, temperature=1.0).metrics
        found.append([metrics["loss"], metrics["grad_norm"]])
    return found


def gathered(context: Any, model_dir: str, shortest: int, longest: int) -> list[tuple[bool, int, int]]:
    """Of each microbatch of a step: whether it is split, its real tokens, and the bytes of keys gathered."""
    from unittest.mock import patch

    from megarl.trainer.megatron import context_attention

    policy = ranks.build(context, model_dir, optimizer={"lr_warmup_steps": 0})
    draw = random.Random(3)
    sequences = []
    for _ in range(12):
        n = draw.randint(shortest, longest)
        sequences.append(TokenSequence([draw.randrange(250) for _ in range(n)], [0] + [1] * (n - 1)))
    original, seen = context_attention._gather, [0]

    def count(k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, group: Any) -> list[torch.Tensor]:
        whole = original(k, v, order, group)
        seen[0] += sum(x.nbytes for x in whole)
        return whole

    found = []
    with patch.object(context_attention, "_gather", count):
        for batch in ranks.prepare(policy, sequences, "token").batches:
            seen[0] = 0
            policy.run([batch], lambda output: sft_loss(output.logprobs()), grad=True)
            assert batch.lengths is not None
            found.append((batch.split, int(batch.lengths.sum()), seen[0]))
    return found
