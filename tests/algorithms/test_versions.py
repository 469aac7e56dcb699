"""The policy version that drew each token, and its staleness."""

from __future__ import annotations

import numpy as np

from megarl.batching.train_batch import train_batch
from megarl.loops.online_metrics import staleness_metrics
from megarl.records import Group, Prompt, Sample, Turn, merge_spans, token_ids
from tests.oracles.samples import token_versions


def sample(version: int, spans: list[tuple[int, int]], length: int = 5, **fields: object) -> Sample:
    ids, logprobs = token_ids([9] * length), np.full(length, -1.0, np.float32)
    return Sample(0, token_ids([1, 2]), ids, logprobs, version, "stop", version_spans=spans, **fields)  # type: ignore[arg-type]


def test_tokens_of_older_versions_are_marked() -> None:
    mixed = sample(3, [(3, 2), (4, 1), (5, 2)])
    assert token_versions(mixed) == [3, 3, 4, 5, 5]
    batch = train_batch([mixed, sample(5, []), sample(4, [])], 5)
    marks = [row.stale.tolist() for row in batch if row.stale is not None]
    assert marks == [[0, 0, 1, 1, 1, 0, 0], [0] * 7, [0, 0] + [1] * 5]
    assert train_batch([mixed]).stale is None


def test_observations_belong_to_the_turn_before() -> None:
    spans = merge_spans([(1, 2), (1, 1), (2, 1), (2, 0), (2, 1)])
    assert spans == [(1, 3), (2, 2)]
    assert merge_spans([(1, 2), (1, 3)]) == []
    episode = sample(1, spans, turns=[Turn(2, 1, 0.0), Turn(2, 0, 1.0)])
    assert token_versions(episode) == [1, 1, 1, 2, 2]
    [sequence] = train_batch([episode], 2)
    assert sequence.loss_mask.tolist() == [0, 0, 1, 1, 0, 1, 1]
    assert sequence.token_ids.tolist() == [1, 2, 9, 9, 9, 9, 9]
    assert sequence.rollout_logprobs is not None and sequence.stale is not None
    assert sequence.rollout_logprobs.tolist() == [0, 0, -1, -1, -1, -1, -1]
    assert sequence.stale.tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert sequence.num_prompt_tokens == 2


def test_staleness_by_hand() -> None:
    samples = [sample(3, [(3, 2), (4, 1), (5, 2)]), sample(5, [], 3), sample(4, [], 2)]
    values = staleness_metrics([Group(Prompt(0, "", [1]), samples)], version=5)
    assert values == {
        "staleness_mean": (2 + 0 + 1) / 3,
        "staleness_max": 2,
        "stale_tokens_fraction": (3 + 0 + 2) / 10,
        "mixed_samples_fraction": 1 / 3,
    }
