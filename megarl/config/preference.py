"""Settings of `megarl dpo` and `megarl rm`, which train on preference pairs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megarl.config.data import (
    FileLocation,
    HfLocation,
    MixtureWeights,
    PromptFormat,
    ReasoningGymSource,
    TrainingDataReading,
)
from megarl.config.hub import ModelPath
from megarl.config.metric_names import DPO, RM
from megarl.config.row_formats import RowColumns
from megarl.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Problems,
    Section,
    Text,
    rule,
)
from megarl.config.training import OfflineRoot, OfflineTraining


class PreferenceColumns(RowColumns):
    """Columns of a preference pair; each holds a string or a list of chat messages."""

    usable: ClassVar[tuple[str, ...]] = ("preference", "unpaired_preference")

    prompt_field: Text | None = None
    """Column with the prompt; null: `prompt` if rows have it, else both responses are conversations."""
    chosen_field: Text = "chosen"
    """Column with the chosen response, or a conversation that ends in it."""
    rejected_field: Text = "rejected"
    """Column with the rejected response, or a conversation that ends in it."""

    @property
    def names_columns(self) -> bool:
        """Whether a column has another name than usual."""
        return any(self.changed("prompt_field", "chosen_field", "rejected_field"))

    @rule
    def _columns_of_the_format(self) -> Problems:
        """With row_format: unpaired_preference, no column has a name of its own."""
        if self.row_format == "unpaired_preference":
            why = "rows of format unpaired_preference have no such column"
            yield from self.unused("prompt_field chosen_field rejected_field", why, "row_format")


class PreferenceJsonlSource(PreferenceColumns, FileLocation):
    """Pairs from a file: {"prompt", "chosen", "rejected"}, or conversations {"chosen", "rejected"}."""


class PreferenceHfSource(PreferenceColumns, HfLocation):
    """Pairs from a Hugging Face dataset, with the same columns as in files."""


class PreferenceReasoningGymSource(ReasoningGymSource):
    """Pairs made of reasoning-gym problems and reference answers."""

    chosen_templates: list[Text] = Field(default=["{answer}"], min_length=1)
    """Templates of the chosen response, each with {answer}; pair i uses template i modulo their number."""
    rejected_templates: list[Text] = Field(default=["{other_answer}"], min_length=1)
    """Templates of the rejected response, with {answer} or {other_answer}, the next different answer."""

    @rule
    def _templates(self) -> Problems:
        """Each template contains {answer}, or in `rejected_templates` {other_answer}."""
        for name, *fields in (
            ("chosen_templates", "{answer}"),
            ("rejected_templates", "{answer}", "{other_answer}"),
        ):
            for template in getattr(self, name):
                if not any(field in template for field in fields):
                    yield name, f"each template needs {' or '.join(fields)} (got {template!r})"


PlainPreferenceSource = Annotated[
    PreferenceReasoningGymSource | PreferenceJsonlSource | PreferenceHfSource, Field(discriminator="source")
]


class PreferenceMixtureSource(MixtureWeights):
    """Pairs from several sources."""

    sources: Annotated[dict[str, PlainPreferenceSource], Field(min_length=2)]
    """The sources, by names of your choice; each is of any other kind."""


PreferenceSource = Annotated[
    PreferenceReasoningGymSource | PreferenceJsonlSource | PreferenceHfSource | PreferenceMixtureSource,
    Field(discriminator="source"),
]


class PreferenceDataConfig(TrainingDataReading):
    """Pairs for training and validation."""

    train: PreferenceSource
    """Training pairs."""
    held_out: PreferenceSource | None = None
    """Pairs for validation only."""
    format: PromptFormat = PromptFormat()
    """Formatting of prompts."""
    shuffle: bool = True
    """Shuffle once per epoch, by run.seed."""

    @rule
    def _no_streams_of_unpaired_rows(self) -> Problems:
        """`row_format: unpaired_preference` needs data that is not streamed."""
        for at in self.streamed("train"):
            if getattr(self.train, "row_format", None) == "unpaired_preference":
                why = "the rows of a pair may lie anywhere in the data: they cannot be streamed (got true)"
                yield f"{at}.streaming", why, f"{at}.row_format"


class PreferenceAlgorithmConfig(Section):
    """The preference loss (docs/algorithms.md has the formulas)."""

    loss: Literal["dpo", "ipo", "kto", "simpo", "orpo"] = "dpo"
    """DPO arXiv:2305.18290, IPO 2310.12036, KTO 2402.01306, SimPO 2405.14734, ORPO 2403.07691."""
    beta: PositiveFloat | None = None
    """Scale of the implicit rewards (ipo: tau; orpo: weight of the odds ratio); null: 0.1, simpo: 2."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped labels, conservative DPO (dpo, simpo)."""
    length_normalization: bool | None = None
    """Divide log-ratios by the response length (dpo, ipo); null: true for ipo, false for dpo."""
    sft_coef: NonNegativeFloat | None = None
    """Weight of the mean negative logprob of the chosen tokens; null: 1 for orpo, else 0."""
    simpo_gamma: NonNegativeFloat | None = None
    """Target margin between the rewards (simpo); null: 1."""
    desirable_weight: PositiveFloat | None = None
    """Weight of chosen responses (kto); null: 1."""
    undesirable_weight: PositiveFloat | None = None
    """Weight of rejected responses (kto); null: 1."""

    reads: ClassVar[dict[str, tuple[str, ...]]] = {
        "dpo": ("label_smoothing", "length_normalization"),
        "ipo": ("length_normalization",),
        "kto": ("desirable_weight", "undesirable_weight"),
        "simpo": ("label_smoothing", "simpo_gamma"),
        "orpo": (),
    }
    """Optional settings that each loss reads."""

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs reference logprobs."""
        return self.loss in ("dpo", "ipo", "kto")

    @rule
    def _options(self) -> Problems:
        """`label_smoothing`, `length_normalization`, `simpo_gamma`, `desirable_weight` and
        `undesirable_weight` need a `loss` that reads them."""
        optional = dict.fromkeys(name for names in self.reads.values() for name in names)
        for name in optional.keys() - set(self.reads[self.loss]):
            always = name == "length_normalization" and self.loss in ("simpo", "orpo")  # fixed by the loss
            why = "always divides by the response length" if always else "does not read it"
            yield from self.unused(name, f"algorithm.loss = {self.loss} {why}", "loss")


class ReferenceConfig(Section):
    """The frozen reference of dpo, ipo and kto; its logprobs are computed once and cached."""

    path: ModelPath | None = None
    """Hugging Face directory or hub id of a model of the same architecture; null: model.path."""
    cache_dir: PathText | None = None
    """Cache of the logprobs, which runs may share; null: <run.dir>/reference."""


class PreferenceTrainingConfig(OfflineTraining):
    """Length and batch size of a preference run."""

    batch_size: PositiveInt
    """Pairs per optimizer step, over all ranks."""
    validation_interval: NonNegativeInt = 0
    """Steps between validations of loss and accuracy (0: only at the end); needs data.held_out."""
    validation_size: PositiveInt = 128
    """Pairs per validation."""


class PreferenceRoot(OfflineRoot):
    """Base of the roots that train on pairs."""

    data: PreferenceDataConfig

    sequences_per_example: ClassVar[int] = 2
    example: ClassVar[str] = "pairs"
    a_step: ClassVar[str] = "a step"

    @rule
    def _pair_fits(self) -> Problems:
        """Both responses of a pair share a microbatch: `packing.max_sequence_length` is at most half of
        `max_tokens_per_microbatch`."""
        longest, budget = self.packing.max_sequence_length, self.packing.max_tokens_per_microbatch
        if longest is not None and longest <= budget < 2 * longest:
            name, both = "packing.max_tokens_per_microbatch", "both responses of a pair share a microbatch"
            reason = f"{both}: at most half of {name} = {budget} (got {longest})"
            yield "packing.max_sequence_length", reason, name


class DpoConfig(PreferenceRoot):
    """Root of `megarl dpo`."""

    algorithm: PreferenceAlgorithmConfig = PreferenceAlgorithmConfig()
    reference: ReferenceConfig = ReferenceConfig()
    training: PreferenceTrainingConfig

    metric_names: ClassVar[frozenset[str]] = DPO

    def describe_batch(self) -> list[str]:
        """Return the lines of --dry-run=full on the batch."""
        needed = self.algorithm.uses_reference
        reference = "once, before the first step" if needed else f"none ({self.algorithm.loss})"
        return [*super().describe_batch(), f"reference logprobs: {reference}"]

    @rule
    def _reference(self) -> Problems:
        """`reference` needs `algorithm.loss` dpo, ipo or kto."""
        unused = () if self.algorithm.uses_reference else ("reference.path", "reference.cache_dir")
        for name, value in self.changed(*unused):
            reason = f"algorithm.loss = {self.algorithm.loss} needs no reference (got {value!r})"
            yield name, reason, "algorithm.loss"

    @rule
    def _reference_of_a_stream(self) -> Problems:
        """Streamed pairs have the start weights as their reference, and no cache: no `reference.path` and
        `reference.cache_dir`."""
        for at in self.data.streamed("train") if self.algorithm.uses_reference else ():
            for name, value in self.changed("reference.path", "reference.cache_dir"):
                why = "streamed pairs get their reference logprobs step by step, from the start weights"
                yield name, f"{why} (got {value!r})", f"data.{at}.streaming"


class RewardAlgorithmConfig(Section):
    """The reward-model loss (Bradley-Terry; docs/algorithms.md has the formula)."""

    center_coef: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's scores, which centers scores at 0 (arXiv:2312.09244)."""


class RmConfig(PreferenceRoot):
    """Root of `megarl rm`."""

    algorithm: RewardAlgorithmConfig = RewardAlgorithmConfig()
    training: PreferenceTrainingConfig

    metric_names: ClassVar[frozenset[str]] = RM

    @rule
    def _no_adapters(self) -> Problems:
        """`lora` is not for reward models, which train all weights and a new head."""
        if self.lora is not None:
            yield "lora", "not for reward models: they train all weights and a new head"
