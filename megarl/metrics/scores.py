"""Scores of an evaluation from graded groups: over all prompts and by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megarl.metrics.passk import (
    IntervalMethod,
    bootstrap_interval,
    consensus_at_k,
    pass_at_k,
    sampled_consensus_at_k,
    wilson_interval,
)
from megarl.records import Group, Sample


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of an evaluation. ``accuracy`` is the share of correct samples: mean@n, which is pass@1.

    ``values`` has ``pass_at_K`` and ``cons_at_K`` for every requested K. ``interval`` is the 95% interval
    of the accuracy: Wilson's with one sample per prompt, else a bootstrap over prompts. ``num_incomplete``
    prompts lack samples that could not be scored.
    """

    num_prompts: int
    num_samples: int
    num_incomplete: int
    accuracy: float
    reward_mean: float
    interval: tuple[float, float]
    interval_method: IntervalMethod
    values: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """Return plain data for summary.json."""
        return {
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.interval),
            "interval_method": f"{self.interval_method}, 95%",
            "reward_mean": self.reward_mean,
            **self.values,
            "num_prompts": self.num_prompts,
            "num_samples": self.num_samples,
            **({"num_incomplete": self.num_incomplete} if self.num_incomplete else {}),
        }


def is_correct(sample: Sample) -> bool:
    """Return whether the reward is at least 1."""
    assert sample.reward is not None
    return sample.reward >= 1.0


def vote_of(sample: Sample) -> tuple[str, bool] | None:
    """Return the vote of a sample: its extracted answer, else its text; None without an answer."""
    answer = sample.info.get("answer", sample.info.get("choice", sample.text))
    text = "" if answer is None else str(answer).strip()
    if any(sample.info.get(name) for name in ("unparsed", "timeout", "incomparable")):
        return None
    # Correct and wrong samples never vote together: a verifier may check more than the answer.
    return (text, is_correct(sample)) if text else None


def score(groups: Sequence[Group], ks: Sequence[int], *, consensus_draws: int = 0, seed: int = 1) -> Scores:
    """Score ``groups``, of equally many samples unless some could not be scored.

    A group without samples is ignored, one with fewer than k samples is ignored for that k; a k for which no
    group has enough is omitted. ``consensus_draws`` 0 selects the closed form of cons@k, else that many
    random subsets per prompt. Raises ValueError if no group has a sample.
    """
    judged = [group for group in groups if group.samples]
    if not judged:
        raise ValueError("no sample was judged")
    most = max(len(group.samples) for group in judged)
    correct = [[is_correct(sample) for sample in group.samples] for group in judged]
    shares = [sum(row) / len(row) for row in correct]
    values: dict[str, float] = {}
    for k in ks:
        if passes := [pass_at_k(len(row), sum(row), k) for row in correct if len(row) >= k]:
            values[f"pass_at_{k}"] = _mean(passes)
    for k in ks:
        enough = [group for group in judged if len(group.samples) >= k]
        if k > 1 and enough:  # cons@1 is the accuracy
            values[f"cons_at_{k}"] = _mean([_consensus(group, k, consensus_draws, seed) for group in enough])
    rewards = [sample.reward or 0.0 for group in judged for sample in group.samples]
    method: IntervalMethod = "wilson" if most == 1 else "bootstrap"
    return Scores(
        num_prompts=len(judged),
        num_samples=len(rewards),
        num_incomplete=sum(len(group.samples) < most for group in groups),
        accuracy=_mean(shares),
        reward_mean=_mean(rewards),
        interval=wilson_interval(sum(map(sum, correct)), len(judged))
        if most == 1
        else bootstrap_interval(shares),
        interval_method=method,
        values=values,
    )


def score_by_category(
    groups: Sequence[Group], ks: Sequence[int], *, consensus_draws: int = 0, seed: int = 1
) -> dict[str, Scores]:
    """Return the scores per ``metadata["category"]``, in alphabetical order; {} without categories."""
    by_category: dict[str, list[Group]] = {}
    for group in groups:
        if group.samples and (category := group.prompt.metadata.get("category")) is not None:
            by_category.setdefault(str(category), []).append(group)
    return {
        name: score(by_category[name], ks, consensus_draws=consensus_draws, seed=seed)
        for name in sorted(by_category)
    }


def table(total: Scores, categories: dict[str, Scores]) -> list[str]:
    """Format as lines: a heading, one line per category, and the total."""
    names = ["problems", "accuracy", "95% interval", *(name.replace("_at_", "@") for name in total.values)]
    width = max(map(len, ["all", *categories]))
    lines = ["  ".join([" " * width, *(f"{name:>14}" for name in names)])]
    for label, scores in [*categories.items(), ("all", total)]:
        interval = f"{scores.interval[0]:.1%}-{scores.interval[1]:.1%}"
        cells = [str(scores.num_prompts), f"{scores.accuracy:.1%}", interval]
        cells += [f"{scores.values[name]:.1%}" if name in scores.values else "-" for name in total.values]
        lines.append("  ".join([f"{label:<{width}}", *(f"{cell:>14}" for cell in cells)]))
    return lines


def _consensus(group: Group, k: int, draws: int, seed: int) -> float:
    votes = [vote_of(sample) for sample in group.samples]
    correct = [is_correct(sample) for sample in group.samples]
    if draws:
        return sampled_consensus_at_k(votes, correct, k, draws, seed + group.prompt.index)
    return consensus_at_k(votes, correct, k)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
