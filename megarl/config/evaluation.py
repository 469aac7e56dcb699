"""Settings of evaluations: `megarl eval`, and those of a GRPO run."""

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


class EvaluationSizeConfig(Section):
    """What is asked of how many held-out problems, and what is counted."""

    num_prompts: PositiveInt | None = 256
    """Held-out problems per evaluation; must not exceed the held-out set; null is all of them."""
    max_new_tokens: PositiveInt | None = None
    """Longest response; null is rollout.max_new_tokens."""
    num_samples_per_prompt: PositiveInt = 1
    """Samples n of each problem; above 1 they need a temperature above 0."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest likeliest tokens with this mass (1: all)."""
    top_k: NonNegativeInt = 0
    """Sample from so many of the likeliest tokens (0: all)."""
    k: list[PositiveInt] = Field(default_factory=list)
    """Report pass@k and cons@k for each of these k, 1 to num_samples_per_prompt (docs/guides/eval.md)."""
    consensus: Literal["closed", "sampled"] = "closed"
    """cons@k over all subsets of k samples in closed form, or over consensus_draws random ones."""
    consensus_draws: PositiveInt = 1000
    """Random subsets per problem of consensus: sampled."""
    category_field: Text | None = None
    """Field of the data set's rows to make a table by; null is the category a benchmark has, if any."""

    @rule
    def _greedy(self) -> Problems:
        if self.temperature > 0:
            return
        if (n := self.num_samples_per_prompt) > 1:
            reason = f"at evaluation.temperature = 0 all samples of a problem are the same (got {n})"
            yield "num_samples_per_prompt", reason, "temperature"
        why = "has no effect at evaluation.temperature = 0, which takes the likeliest"
        yield from self.unused("top_p top_k", why, "temperature")

    @rule
    def _subsets(self) -> Problems:
        n = self.num_samples_per_prompt
        for k in (k for k in self.k if k > n):
            reason = f"k must be at most evaluation.num_samples_per_prompt = {n} (got {k})"
            yield "k", reason, "num_samples_per_prompt"

    @rule
    def _consensus(self) -> Problems:
        if self.consensus == "closed":
            why = "is only used with evaluation.consensus: sampled"
            yield from self.unused("consensus_draws", why, "consensus")
        elif not any(k > 1 for k in self.k):
            reason = "needs a k above 1 in evaluation.k: cons@k is of k samples (got 'sampled')"
            yield "consensus", reason, "k"


class EvaluationConfig(EvaluationSizeConfig):
    """Accuracy on held-out problems before, during and after training; greedy unless told otherwise."""

    interval: NonNegativeInt = 0
    """Evaluate every so many steps (0: only before and after)."""
    at_start: bool = True
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""

    @property
    def asked_by(self) -> list[str]:
        """The fields by which a run evaluates at all."""
        return [name for name in ("interval", "at_start", "at_end") if getattr(self, name)]
