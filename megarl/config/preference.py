"""Settings of `megarl dpo`: training on pairs of a preferred and a rejected response."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.data import (
    FileLocation,
    HfLocation,
    MixtureWeights,
    PromptFormat,
    ReasoningGymSource,
    TrainingDataReading,
)
from megarl.config.schema import TrainingRoot
from megarl.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Text


class PreferenceColumns(Section):
    """Which columns make a pair; each holds a string or a list of chat messages."""

    prompt_field: Text | None = None
    """Column with the prompt; null: `prompt`, where rows have it (else both responses are conversations)."""
    chosen_field: Text = "chosen"
    """Column with the preferred response, or the conversation that ends in it."""
    rejected_field: Text = "rejected"
    """Column with the other one."""


class PreferenceJsonlSource(PreferenceColumns, FileLocation):
    """Pairs in a file: {"prompt", "chosen", "rejected"}, or conversations {"chosen", "rejected"}."""


class PreferenceHfSource(PreferenceColumns, HfLocation):
    """Pairs in a Hugging Face dataset, as in files."""


class PreferenceReasoningGymSource(ReasoningGymSource):
    """reasoning-gym problems with two responses made from reference answers."""

    chosen_templates: list[Text] = Field(default=["{answer}"], min_length=1)
    """Forms of the chosen response, each with {answer}; pair i uses form i modulo their number."""
    rejected_templates: list[Text] = Field(default=["{other_answer}"], min_length=1)
    """Forms of the rejected one, with {answer} or {other_answer}, the next problem's that has another."""


PlainPreferenceSource = Annotated[
    PreferenceReasoningGymSource | PreferenceJsonlSource | PreferenceHfSource, Field(discriminator="source")
]


class PreferenceMixtureSource(MixtureWeights):
    """Pairs of several sources."""

    sources: Annotated[dict[str, PlainPreferenceSource], Field(min_length=2)]
    """The sources by names of your choice; each is any other kind of source."""


PreferenceSource = Annotated[
    PreferenceReasoningGymSource | PreferenceJsonlSource | PreferenceHfSource | PreferenceMixtureSource,
    Field(discriminator="source"),
]


class PreferenceDataConfig(TrainingDataReading):
    """Pairs to learn from and to validate on."""

    train: PreferenceSource
    """Pairs."""
    held_out: PreferenceSource | None = None
    """Pairs only the validation sees."""
    format: PromptFormat = PromptFormat()
    """How a problem becomes prompt tokens."""
    shuffle: bool = True
    """Shuffle once per epoch, by run.seed."""


class PreferenceAlgorithmConfig(Section):
    """Which loss over pairs (docs/algorithms.md has the formulas)."""

    loss: Literal["dpo", "ipo", "kto", "simpo", "orpo"] = "dpo"
    """DPO arXiv:2305.18290, IPO 2310.12036, KTO 2402.01306, SimPO 2405.14734, ORPO 2403.07691."""
    beta: PositiveFloat | None = None
    """Scale of the rewards (ipo: the paper's tau; orpo: weight of the odds ratio); null: 0.1, simpo 2."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of labels believed to be wrong, conservative DPO (dpo, simpo)."""
    length_normalization: bool | None = None
    """Divide log-ratios by the response's tokens (dpo, ipo); null: true for ipo, false for dpo."""
    sft_coef: NonNegativeFloat | None = None
    """Weight of the chosen tokens' mean negative logprob; null: 1 for orpo, else 0."""
    simpo_gamma: NonNegativeFloat | None = None
    """Margin the rewards are to differ by (simpo); null: 1."""
    desirable_weight: PositiveFloat | None = None
    """Weight of the chosen responses (kto); null: 1."""
    undesirable_weight: PositiveFloat | None = None
    """Weight of the rejected responses (kto); null: 1."""


class ReferenceConfig(Section):
    """The frozen model that dpo, ipo and kto compare with; its logprobs are computed once and kept."""

    path: Text | None = None
    """Hugging Face directory of the same architecture; null is model.path."""
    cache_dir: Text | None = None
    """Where the logprobs are kept, for other runs too; null is <run.dir>/reference."""


class PreferenceTrainingConfig(Section):
    """Length and batch of a preference run."""

    num_steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt
    """Pairs per step, over all ranks."""
    validation_interval: NonNegativeInt = 0
    """Validation loss and accuracy every so many steps (0: only at the end); needs data.held_out."""
    validation_size: PositiveInt = 128
    """Pairs per validation."""


class DpoConfig(TrainingRoot):
    """Root of `megarl dpo`."""

    data: PreferenceDataConfig
    algorithm: PreferenceAlgorithmConfig = PreferenceAlgorithmConfig()
    reference: ReferenceConfig = ReferenceConfig()
    training: PreferenceTrainingConfig


class RewardAlgorithmConfig(Section):
    """The loss of a reward model (Bradley-Terry; docs/algorithms.md has the formula)."""

    center_coef: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores around 0 (arXiv:2312.09244)."""


class RmConfig(TrainingRoot):
    """Root of `megarl rm`."""

    data: PreferenceDataConfig
    algorithm: RewardAlgorithmConfig = RewardAlgorithmConfig()
    training: PreferenceTrainingConfig
