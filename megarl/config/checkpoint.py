"""When a run saves, how, and what it keeps."""

from __future__ import annotations

from typing import Literal

from megarl.config.section import NonNegativeInt, PositiveInt, Problems, Section, Text, rule


class CheckpointConfig(Section):
    """When to save, and how much to keep."""

    interval: NonNegativeInt = 50
    """Save every so many steps (and at the end); 0 saves only at the end."""
    keep: PositiveInt = 2
    """Complete checkpoints to keep; older ones are deleted."""
    keep_best_metric: Text | None = None
    """Beside the newest, keep the checkpoint whose step had the best value of this metric (metrics.jsonl)."""
    keep_best_mode: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value of keep_best_metric is the best."""
    async_save: bool = False
    """Write in the background: a step waits only until its state is copied to host memory."""
    save_optimizer: bool = True
    """Without it a run cannot be resumed, only its weights used."""
    export_hf: bool = True
    """Write the final weights as a Hugging Face directory, <run.dir>/hf."""

    @rule
    def _best(self) -> Problems:
        if self.keep_best_metric is None and self.keep_best_mode != "max":
            reason = "has nothing to compare: checkpoint.keep_best_metric is not set (got 'min')"
            yield "keep_best_mode", reason, "keep_best_metric"
