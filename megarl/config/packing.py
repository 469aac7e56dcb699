"""How sequences become microbatches."""

from __future__ import annotations

from typing import Literal

from megarl.config.section import PositiveInt, Problems, Section, rule


class PackingConfig(Section):
    """How sequences become microbatches."""

    max_tokens_per_microbatch: PositiveInt = 4096
    """Token budget of one microbatch; no single sequence may exceed it."""
    max_sequence_length: PositiveInt | None = None
    """Longest prompt + response; null is what the model's positions and the token budget both allow."""
    share_prefix: Literal["auto", "off"] = "auto"
    """auto: compute a group's prompt once where that saves a tenth of its tokens (grpo); the same result."""

    @rule
    def _token_budget(self) -> Problems:
        longest, budget = self.max_sequence_length, self.max_tokens_per_microbatch
        if longest is not None and longest > budget:
            fits = "a sequence of this length must fit into one microbatch"
            reason = f"{fits}, packing.max_tokens_per_microbatch = {budget} (got {longest})"
            yield "max_sequence_length", reason, "max_tokens_per_microbatch"
