"""Settings of `megarl sft`."""

from __future__ import annotations

from typing import ClassVar

from megarl.config.data import SftDataConfig
from megarl.config.metric_names import SFT
from megarl.config.section import NonNegativeInt, PositiveInt
from megarl.config.training import OfflineRoot, OfflineTraining


class SftTrainingConfig(OfflineTraining):
    """Length and batch size of an SFT run."""

    batch_size: PositiveInt
    """Sequences per optimizer step, over all ranks."""
    validation_interval: NonNegativeInt = 0
    """Steps between validations of the loss (0: only at the end); needs data.held_out."""
    validation_size: PositiveInt = 128
    """Sequences per validation."""


class SftConfig(OfflineRoot):
    """Root of `megarl sft`."""

    data: SftDataConfig
    training: SftTrainingConfig

    metric_names: ClassVar[frozenset[str]] = SFT
