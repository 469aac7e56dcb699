"""Settings of evaluation: `megarl eval`, and evaluations during online training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Problems,
    Section,
    Text,
    rule,
)

LEAST_TEMPERATURE = 0.01
"""vLLM raises a lower one to this, and calls one below 1e-5 greedy."""


class EvaluationSizeConfig(Section):
    """Size, sampling and metrics of an evaluation."""

    num_prompts: PositiveInt | None = 256
    """Held-out prompts per evaluation, at most the size of the held-out set; null: all."""
    max_new_tokens: PositiveInt | None = None
    """Maximum tokens of a response; null: rollout.max_new_tokens."""
    num_samples_per_prompt: PositiveInt = 1
    """Samples n per prompt; n > 1 needs a temperature above 0."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability mass (1: off)."""
    top_k: NonNegativeInt = 0
    """Sample from the k likeliest tokens (0: off)."""
    k: list[PositiveInt] = Field(default_factory=list)
    """Report pass@k and cons@k for each of these k, 1 to num_samples_per_prompt (docs/guides/eval.md)."""
    consensus: Literal["closed", "sampled"] = "closed"
    """cons@k over all subsets of k samples (closed form), or over consensus_draws random ones."""
    consensus_draws: PositiveInt = 1000
    """Random subsets per prompt for consensus: sampled."""
    category_field: Text | None = None
    """Field to tabulate results by; null: the benchmark's category, if any."""

    @rule
    def _temperature(self) -> Problems:
        """`temperature` is 0 (greedy) or at least 0.01."""
        if 0 < self.temperature < LEAST_TEMPERATURE:
            yield (
                "temperature",
                f"must be 0 (greedy) or at least {LEAST_TEMPERATURE} (got {self.temperature:g})",
            )

    @rule
    def _greedy(self) -> Problems:
        """`num_samples_per_prompt` > 1, `top_p` and `top_k` need `temperature` > 0."""
        if self.temperature > 0:
            return
        if (n := self.num_samples_per_prompt) > 1:
            reason = f"at evaluation.temperature = 0 all samples of a prompt are equal (got {n})"
            yield "num_samples_per_prompt", reason, "temperature"
        why = "has no effect at evaluation.temperature = 0 (greedy)"
        yield from self.unused("top_p top_k", why, "temperature")

    @rule
    def _subsets(self) -> Problems:
        """Each of `k` is at most `num_samples_per_prompt`."""
        n = self.num_samples_per_prompt
        for k in (k for k in self.k if k > n):
            reason = f"k must be at most evaluation.num_samples_per_prompt = {n} (got {k})"
            yield "k", reason, "num_samples_per_prompt"

    @rule
    def _consensus(self) -> Problems:
        """`consensus: sampled` needs a `k` above 1; `consensus_draws` needs `consensus: sampled`."""
        if self.consensus == "closed":
            why = "has no effect: needs evaluation.consensus: sampled"
            yield from self.unused("consensus_draws", why, "consensus")
        elif not any(k > 1 for k in self.k):
            reason = "needs a k above 1 in evaluation.k (got 'sampled')"
            yield "consensus", reason, "k"


class EvaluationConfig(EvaluationSizeConfig):
    """Accuracy on held-out prompts before, during and after training; greedy by default."""

    interval: NonNegativeInt = 0
    """Steps between evaluations (0: only before and after training)."""
    at_start: bool | None = None
    """Evaluate before the first step; null: if data.held_out is set."""
    at_end: bool | None = None
    """Evaluate after the last step; null: if data.held_out is set."""

    @property
    def asked_by(self) -> dict[str, str]:
        """The fields that request an evaluation of their own accord, each with the value that does not."""
        off = {"interval": "0", "at_start": "false", "at_end": "false"}
        return {name: value for name, value in off.items() if getattr(self, name)}
