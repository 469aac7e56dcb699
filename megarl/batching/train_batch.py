"""Convert samples of a rollout to a training batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from megarl.records import Sample, TrainBatch


def train_batch(samples: Sequence[Sample], version: int | None = None) -> TrainBatch:
    """Return one sequence per sample, prompt and response; the tokens sampled by the policy are the targets.

    With ``version``, the trainer's, tokens of older versions are marked as stale. Expert choices are included
    if any sample has them; a sequence's last token, which the engine never processed, has none.
    """
    prompts = np.array([len(s.prompt_ids) for s in samples], dtype=np.int64)
    offsets = np.zeros(len(samples) + 1, dtype=np.int64)
    np.cumsum(prompts + [len(s.response_ids) for s in samples], out=offsets[1:])
    token_ids = np.empty(offsets[-1], dtype=np.int32)
    loss_mask = np.zeros(offsets[-1], dtype=np.uint8)
    has_logprobs = any(len(sample.rollout_logprobs) for sample in samples)
    logprobs = np.zeros(offsets[-1], dtype=np.float32) if has_logprobs else None
    stale = None if version is None else np.zeros(offsets[-1], dtype=np.uint8)
    experts = _unset_experts(samples, int(offsets[-1]))
    responses = (offsets[:-1] + prompts).tolist()
    for sample, start, response, (_, end) in zip(
        samples, offsets.tolist(), responses, pairwise(offsets.tolist()), strict=False
    ):
        token_ids[start:response] = sample.prompt_ids
        token_ids[response:end] = sample.response_ids
        if logprobs is not None:
            logprobs[response:end] = sample.rollout_logprobs
        for begin, count in _sampled_runs(sample):
            loss_mask[response + begin : response + begin + count] = 1
        if stale is not None:
            assert version is not None
            for begin, count in _older_runs(sample, version):
                stale[response + begin : response + begin + count] = 1
        if experts is not None and sample.experts is not None:
            assert len(sample.experts) < end - start, f"{len(sample.experts)} choices, {end - start} tokens"
            experts[start : start + len(sample.experts)] = sample.experts
    return TrainBatch(token_ids, offsets, loss_mask, prompts, logprobs, stale, experts)


def _sampled_runs(sample: Sample) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of the response's runs of sampled tokens."""
    if not sample.turns:
        yield 0, len(sample.response_ids)
    begin = 0
    for turn in sample.turns:
        yield begin, turn.num_sampled
        begin += turn.num_sampled + turn.num_observed


def _older_runs(sample: Sample, version: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of the runs sampled by versions before ``version``."""
    begin = 0
    for drawn_by, count in sample.version_spans or [(sample.policy_version, len(sample.response_ids))]:
        if drawn_by < version:
            yield begin, count
        begin += count


def _unset_experts(samples: Sequence[Sample], num_tokens: int) -> np.ndarray | None:
    """Return [T, layers, k] filled with -1 if any sample has expert choices, else None."""
    shape = next((s.experts.shape[1:] for s in samples if s.experts is not None), None)
    return None if shape is None else np.full((num_tokens, *shape), -1, dtype=np.int16)
