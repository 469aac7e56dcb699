"""Settings of sequence packing."""

from __future__ import annotations

from typing import Literal

from megarl.config.section import PositiveInt, Problems, Section, rule


class PackingConfig(Section):
    """Packing of sequences into microbatches."""

    max_tokens_per_microbatch: PositiveInt = 4096
    """Token budget of a microbatch; no sequence may exceed it."""
    max_sequence_length: PositiveInt | None = None
    """Longest prompt + response in tokens; null: min(model positions, token budget)."""
    share_prefix: Literal["auto", "off"] = "auto"
    """auto: compute a group's prompt once if that saves 10% of its tokens (grpo); the result is the same."""

    @rule
    def _token_budget(self) -> Problems:
        """`max_sequence_length` must not exceed `max_tokens_per_microbatch`."""
        longest, budget = self.max_sequence_length, self.max_tokens_per_microbatch
        if longest is not None and longest > budget:
            fits = "a sequence of this length must fit into a microbatch"
            reason = f"{fits}, packing.max_tokens_per_microbatch = {budget} (got {longest})"
            yield "max_sequence_length", reason, "max_tokens_per_microbatch"
