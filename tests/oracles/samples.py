"""Expand a sample's spans token by token."""

from __future__ import annotations

from megarl.records import Sample


def response_mask(sample: Sample) -> list[int]:
    """[N] 1 where the token was sampled, 0 where it was observed."""
    if not sample.turns:
        return [1] * len(sample.response_ids)
    return [value for t in sample.turns for value in [1] * t.num_sampled + [0] * t.num_observed]


def token_versions(sample: Sample) -> list[int]:
    """[N] the policy version that drew each response token (an observation's: of the turn before)."""
    spans = sample.version_spans or [(sample.policy_version, len(sample.response_ids))]
    return [version for version, count in spans for _ in range(count)]
