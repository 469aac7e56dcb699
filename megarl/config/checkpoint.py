"""Settings of checkpoints."""

from __future__ import annotations

from typing import Literal

from megarl.config.section import NonNegativeInt, PositiveInt, Problems, Section, Text, rule


class CheckpointConfig(Section):
    """Interval, content and retention of checkpoints."""

    interval: NonNegativeInt = 50
    """Steps between checkpoints; one more is saved at the end. 0: only at the end."""
    keep: PositiveInt = 2
    """Number of complete checkpoints to keep; older ones are deleted."""
    keep_best_metric: Text | None = None
    """Also keep the checkpoint of the step with the best value of this metric (names: metrics.jsonl)."""
    keep_best_mode: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value of keep_best_metric is best."""
    async_save: bool = False
    """Write in the background; the step waits only for the copy to host memory."""
    save_optimizer: bool = True
    """Save the optimizer state. If false, the run cannot be resumed; only its weights can be used."""
    export_hf: bool = True
    """Export the final weights as a Hugging Face directory, <run.dir>/hf."""

    @rule
    def _best(self) -> Problems:
        """`keep_best_mode` needs `keep_best_metric`."""
        if self.keep_best_metric is None and self.keep_best_mode != "max":
            reason = "has no effect: checkpoint.keep_best_metric is not set (got 'min')"
            yield "keep_best_mode", reason, "keep_best_metric"
