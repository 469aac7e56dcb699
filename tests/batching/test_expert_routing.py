"""Expert choices and padding stay aligned with their tokens, on every context-parallel rank."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megarl.batching.context_parallel import context_parallel_slice
from megarl.batching.expert_routing import real_tokens
from megarl.batching.pack import pack
from megarl.batching.shared_prefix import share_prefixes
from megarl.batching.train_batch import train_batch
from megarl.records import Sample, TokenSequence, TrainBatch, token_ids


def marked(token_ids: list[int]) -> TokenSequence:
    """Two layers, two experts: each token's choice encodes the token."""
    experts = np.array(token_ids)[:, None, None] * 10 + np.arange(4).reshape(2, 2)
    return TokenSequence(token_ids, [0] * len(token_ids), experts=experts.astype(np.int16))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_choices_follow_their_tokens(size: int) -> None:
    sequences = TrainBatch.of(
        [marked([3, 1, 4, 1, 5]), TokenSequence([9, 2], [0, 0]), marked([6, 5, 3, 5, 8, 9, 7, 9, 3])]
    )
    whole = pack(sequences, [2, 1, 0], pad_to_multiple=2 * size)
    num_real = 0
    for rank in range(size):
        batch = context_parallel_slice(whole, rank, size)
        packed = pack(sequences, [2, 1, 0], pad_to_multiple=2 * size, cp_rank=rank, cp_size=size)
        experts, real = packed.experts, real_tokens(batch, rank, size)
        assert experts is not None and torch.equal(experts, batch.experts)
        num_real += int(real.sum())
        for token, sequence, choice, is_real in zip(
            batch.token_ids.tolist(),
            batch.sequence_ids.tolist(),
            experts.tolist(),
            real.tolist(),
            strict=True,
        ):
            given = is_real and sequence != 1
            assert choice == (
                [[token * 10, token * 10 + 1], [token * 10 + 2, token * 10 + 3]]
                if given
                else [[-1, -1], [-1, -1]]
            )
    assert num_real == 16
    assert pack(TrainBatch.of([TokenSequence([9, 2], [0, 0])]), [0]).experts is None


def test_shared_prefixes_take_theirs_along() -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    sequences = [marked([*prompt, 10 + n, 20 + n]) for n in range(4)]
    batch = TrainBatch.of(dataclasses.replace(s, num_prompt_tokens=6) for s in sequences)
    segments, _ = share_prefixes(batch, np.arange(4), max_tokens=100, pad_to_multiple=1)
    assert len(segments) == 5
    packed = pack(batch, [0, 1, 2, 3, 4], segments=segments)
    assert packed.experts is not None and packed.prefixes is not None
    assert packed.experts[:, 0, 0].tolist() == [10 * token for token in packed.token_ids.tolist()]


def test_the_last_token_of_a_sample_is_left_to_the_trainer() -> None:
    logprobs = np.zeros(1, np.float32)
    sample = Sample(0, token_ids([1, 2]), token_ids([3]), logprobs, 0, "stop")
    plain = dataclasses.replace(sample, response_ids=token_ids([4]))
    sample.experts = np.ones((2, 2, 2), dtype=np.int16)
    replayed = train_batch([sample, plain]).experts
    assert replayed is not None
    assert replayed[:3].tolist() == [[[1, 1], [1, 1]], [[1, 1], [1, 1]], [[-1, -1], [-1, -1]]]
    assert (replayed[3:] == -1).all() and replayed.shape == (6, 2, 2)
    assert train_batch([plain]).experts is None
