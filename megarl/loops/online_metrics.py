"""Metrics of an online run: per rollout, per run, and samples for the log."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from megarl.advantages.group import zero_std_fraction
from megarl.batching.token_trace import TracedTokens
from megarl.config.online import OnlineConfig
from megarl.inference.interface import EngineMemory
from megarl.losses.logprob_mismatch import LogprobMismatch
from megarl.metrics.checks import DIFFERENCE_LIMITS
from megarl.metrics.timers import PHASES
from megarl.records import Group, Sample
from megarl.runs.memory_meter import as_metrics
from megarl.sampling.rollout_manager import sample_row


def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """Return rewards, lengths and finish reasons of the samples of one step."""
    samples = [sample for group in groups for sample in group.samples]
    bounds = np.array([0, *accumulate(len(group.samples) for group in groups)])
    rewards = np.array([float(s.reward or 0.0) for s in samples])
    lengths = [sample.num_sampled_tokens for sample in samples]
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "reward_min": float(rewards.min()),
        "reward_max": float(rewards.max()),
        "zero_std_groups_fraction": zero_std_fraction(rewards, bounds),
        "response_length_mean": sum(lengths) / len(lengths),
        "response_length_max": max(lengths),
        "truncated_fraction": sum(s.finish_reason == "length" for s in samples) / len(samples),
        "num_response_tokens": sum(lengths),
    }


def staleness_metrics(groups: list[Group], version: int) -> dict[str, float]:
    """Return the staleness of the samples relative to a policy of ``version`` updates."""
    samples = [sample for group in groups for sample in group.samples]
    ages = [version - sample.policy_version for sample in samples]
    spans = [
        span
        for sample in samples
        for span in sample.version_spans or [(sample.policy_version, len(sample.response_ids))]
    ]
    stale = sum(count for drawn, count in spans if drawn < version)
    return {
        "staleness_mean": sum(ages) / len(ages),
        "staleness_max": max(ages),
        "stale_tokens_fraction": stale / sum(len(sample.response_ids) for sample in samples),
        "mixed_samples_fraction": sum(bool(sample.version_spans) for sample in samples) / len(samples),
    }


def describe_overlap(config: OnlineConfig, step: int) -> list[str]:
    """Return log lines on rollout.max_staleness, for a run that begins after ``step``."""
    k, algorithm = config.rollout.max_staleness, config.algorithm
    lines = [
        f"rollouts run up to {k} step(s) ahead of training; the engine pauses from the first optimizer step "
        "of a batch until it has the new weights"
    ]
    if step:
        lines.append(f"rollouts in flight after step {step} are sampled again, from the same prompts")
    if not algorithm.corrects_staleness:
        lines.append(
            "neither algorithm.off_policy_correction nor algorithm.old_logprobs = rollout is set: samples of "
            "older weights are trained on as if they were on-policy"
        )
    return lines


def first_samples(groups: list[Group], count: int) -> list[tuple[Group, Sample]]:
    """Return the first ``count`` samples of a step, whole groups first."""
    every = ((group, sample) for group in groups for sample in group.samples)
    return list(itertools.islice(every, count))


def sample_rows(
    step: int,
    chosen: list[tuple[Group, Sample]],
    decode: Callable[[int], str],
    traced: Mapping[int, TracedTokens],
) -> list[dict[str, Any]]:
    """Return samples/step_N.jsonl's rows of trained samples.

    ``chosen`` are the first samples of the step, ``traced`` what the trainer computed for some of them, by
    number; ``decode`` turns one token id into text.
    """
    return [
        sample_row(step, group, sample)
        | {
            "advantage": sample.advantage,
            "policy_version": sample.policy_version,
            **({"version_spans": sample.version_spans} if sample.version_spans else {}),
            "num_response_tokens": sample.num_sampled_tokens,
            "info": sample.info,
            "rollout_logprobs": [round(v, 7) for v in sample.rollout_logprobs.tolist()],
            "response_tokens": [decode(i) for i in sample.response_ids.tolist()],
            **(_traced_row(traced[number]) if number in traced else {}),
        }
        for number, (group, sample) in enumerate(chosen)
    ]


def _traced_row(tokens: TracedTokens) -> dict[str, Any]:
    """Return the trainer's per-token values for the samples file; null at tokens without a target."""
    values = {
        "trainer_logprobs": tokens.logprobs,
        "entropy": tokens.entropy,
        "token_advantages": tokens.advantages,
    }
    return {
        name: [None if math.isnan(v) else round(v, 7) for v in each.tolist()]
        for name, each in values.items()
        if each is not None
    }


def engine_memory(memory: EngineMemory) -> dict[str, float]:
    """Return an engine's memory as metrics; on a CPU without what only a GPU's allocator knows."""
    sizes = {f"engine_{name}": size for name, size in asdict(memory).items()}
    if not memory.allocated:
        del sizes["engine_allocated"]
    return as_metrics(sizes)


def disagreement(mismatch: LogprobMismatch, dtype: str, decode: Callable[[int], str]) -> str | None:
    """Return a line about the token with the largest mismatch, if it is above the bound for ``dtype``."""
    bound, worst = DIFFERENCE_LIMITS[dtype], mismatch.worst
    if worst is None or worst.difference <= bound:
        return None
    return (
        f"engine and trainer differ by {worst.difference:.2e} (above {bound:g}) on token {worst.label} "
        f"{decode(worst.label)!r}: trainer {worst.trainer_logprob:.5f}, engine {worst.rollout_logprob:.5f}. "
        "They are not the same policy: compare their dtypes and weights."
    )


def run_summary(kind: str, num_steps: int, totals: dict[str, float]) -> dict[str, Any]:
    """Return summary.json's entries about the whole run, across resumes."""
    seconds = {phase: totals.get(f"seconds_{phase}", 0.0) for phase in PHASES}
    wall = totals.get("wall_seconds", 0.0)  # start-up and evaluation included, under "other"
    seconds["other"] = wall - sum(seconds[phase] for phase in PHASES if phase != "other")

    def speed(phase: Literal["rollout", "train"]) -> float:
        return totals.get(f"{phase}_tokens", 0) / seconds[phase] if seconds[phase] else 0.0

    return {
        "accuracy_before": totals.get("accuracy_before"),
        "accuracy_after": totals.get("accuracy_after"),
        f"{kind}_steps": num_steps,
        "wall_seconds": wall,
        "phase_seconds": seconds,
        "tokens_per_second": {"rollout": speed("rollout"), "train": speed("train")},
        "weights_bytes_moved": int(totals.get("weights_bytes_moved", 0)),
        "logprob_abs_diff_max": totals.get("logprob_abs_diff_max", 0.0),
    }
