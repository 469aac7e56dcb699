"""Where data comes from: problems, demonstrations, and what the sources of both have in common.

A source is one of: ``reasoning_gym`` (generated), ``jsonl`` and ``file`` (files), ``hf`` (Hugging Face
datasets), ``benchmark`` (problems only), or ``mixture``, which draws from several of these. Problems may also
be made by an ``environment``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from megarl.config.benchmarks import BenchmarkSource as BenchmarkSource
from megarl.config.curriculum import CurriculumConfig
from megarl.config.environments import EnvironmentConfig, EnvironmentSource, MathEnvironmentConfig
from megarl.config.section import (
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Problems,
    Section,
    Text,
    rule,
)


class ReasoningGymSource(Section):
    """Generated, verifiable problems from the reasoning-gym package."""

    source: Literal["reasoning_gym"]
    """Selects this kind of source."""
    task: Text
    """Dataset name in reasoning-gym, e.g. chain_sum."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that dataset, e.g. {min_terms: 2, max_terms: 2}."""
    size: PositiveInt = 10_000
    """Number of problems."""
    seed: NonNegativeInt = 1
    """Problem i is made from seed + i; train and held-out ranges [seed, seed + size) must not overlap."""
    extract: Literal["response", "last_number"] = "response"
    """What is scored: the response (its <answer> part where it has one), or the last number in that."""
    partial_credit: bool = True
    """Keep the task's scores below 1 (chain_sum gives 0.5 to 13 where 3 is right); false makes them 0."""

    @property
    def problems(self) -> tuple[str, range]:
        """What is made, and from which seeds."""
        return self.task, range(self.seed, self.seed + self.size)


FILE_KINDS = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
"""Endings of the names of files that can be read."""


class FileLocation(Section):
    """Rows of a file."""

    source: Literal["jsonl", "file"]
    """jsonl reads a JSON object per line; file goes by the ending: .jsonl .json .parquet .csv .arrow."""
    path: PathText
    """The file."""

    @rule
    def _kind(self) -> Problems:
        if self.source == "file" and PurePath(self.path).suffix.lower() not in FILE_KINDS:
            kinds = ", ".join(FILE_KINDS)
            yield "path", f"its name must end in {kinds}: that says how it is read (got {self.path!r})"


class HfLocation(Section):
    """Rows of a Hugging Face dataset."""

    source: Literal["hf"]
    """Selects this kind of source."""
    dataset: PathText
    """Hub name, or a local directory: saved by save_to_disk, or with data files."""
    subset: Text | None = None
    """The dataset's configuration; null is its default."""
    split: Text = "train"
    """Split, slices included, e.g. train[:1000]."""
    revision: Text | None = None
    """Git revision on the hub; null is the newest."""

    @property
    def rows(self) -> tuple[str | None, ...]:
        """Which rows of which dataset."""
        return self.dataset, self.subset, self.split, self.revision


class PromptReasoningGymSource(ReasoningGymSource):
    """Problems of a reasoning-gym task, their difficulty rising where asked for."""

    curriculum: CurriculumConfig | None = None
    """Raise the task's level with the accuracy (data.train; saved with the run); null: arguments alone."""


class PromptColumns(Section):
    """Which columns make a problem."""

    prompt_field: Text = "prompt"
    """Field with the problem (a string, or a list of chat messages)."""
    answer_field: Text = "answer"
    """Field with the reference answer."""
    environment: EnvironmentConfig = MathEnvironmentConfig()
    """How answers are judged."""


class JsonlSource(PromptColumns, FileLocation):
    """Prompt/answer pairs from a file: JSONL (one object per line), JSON, parquet, CSV or Arrow."""


class PromptHfSource(PromptColumns, HfLocation):
    """Prompt/answer pairs from a Hugging Face dataset."""


PlainPromptSource = Annotated[
    PromptReasoningGymSource | JsonlSource | PromptHfSource | BenchmarkSource, Field(discriminator="source")
]


class MixtureWeights(Section):
    """Several sources, drawn from in given shares."""

    source: Literal["mixture"]
    """Selects this kind of source."""
    weights: dict[str, PositiveFloat] | None = None
    """Share of each source in what is drawn, by its name; null draws every row once per epoch."""

    if TYPE_CHECKING:
        sources: Any

    @rule
    def _every_source_once(self) -> Problems:
        if self.weights is not None and (differ := sorted(set(self.sources) ^ set(self.weights))):
            reason = "must give each of the sources a weight, and nothing else (they differ in {})"
            yield "weights", reason.format(", ".join(differ))


class PromptMixtureSource(MixtureWeights):
    """Problems of several sources."""

    sources: Annotated[dict[str, PlainPromptSource], Field(min_length=2)]
    """The sources by names of your choice; each is any other kind of source."""


PromptSource = Annotated[
    PromptReasoningGymSource
    | JsonlSource
    | PromptHfSource
    | BenchmarkSource
    | PromptMixtureSource
    | EnvironmentSource,
    Field(discriminator="source"),
]


class PromptFormat(Section):
    """How a problem becomes prompt tokens."""

    chat_template: bool = True
    """Apply the tokenizer's chat template; otherwise the bare problem text is the prompt."""
    system_prompt: str | None = None
    """System message placed first (chat template only)."""
    prompt_suffix: str = ""
    """Text appended to every problem, e.g. an instruction on the answer's form."""

    @rule
    def _system_prompt(self) -> Problems:
        if self.system_prompt is not None and not self.chat_template:
            reason = "only a chat template has a place for it, and data.format.chat_template is false"
            yield "system_prompt", reason, "chat_template"


class LengthFilter(Section):
    """Which lengths are kept; what is dropped is counted and shown when a run starts."""

    min_tokens: PositiveInt | None = None
    """Drop what is shorter (problems: the prompt; preference pairs: the shorter of the two)."""
    max_tokens: PositiveInt | None = None
    """Drop what is longer (preference pairs: the longer of the two)."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with that which the run's longest sequence cannot hold."""

    @rule
    def _lengths(self) -> Problems:
        low, high = self.min_tokens, self.max_tokens
        if low is not None and high is not None and low > high:
            reason = f"larger than data.filter.max_tokens = {high}: nothing would be left (got {low})"
            yield "min_tokens", reason, "max_tokens"


Split = Literal["train", "held_out"]


def parts_of(source: Any, at: str) -> Iterator[tuple[str, Any]]:
    """The plain sources of a source, each with its place in the configuration; itself where it is plain."""
    if isinstance(source, MixtureWeights):
        for name, part in getattr(source, "sources", {}).items():
            yield f"{at}.sources.{name}", part
    elif source is not None:
        yield at, source


class DataReading(Section):
    """What happens to rows that cannot be used."""

    on_bad_row: Literal["error", "skip"] = "error"
    """A malformed row ends the command with the first three; skip leaves it out and reports the same."""
    filter: LengthFilter = LengthFilter()
    """Which lengths are kept."""

    measured: ClassVar[tuple[Split, ...]] = ("held_out",)
    """The splits that nothing is learned from."""
    if TYPE_CHECKING:  # every kind of data has them, each with sources of its own
        train: Any
        held_out: Any
        format: PromptFormat

    def curricula(self, split: Split) -> list[str]:
        """Where the sources of a split ask for levels that rise."""
        found = parts_of(getattr(self, split), split)
        return [f"{at}.curriculum" for at, part in found if getattr(part, "curriculum", None) is not None]

    @rule
    def _separate_splits(self) -> Problems:
        for train_at, train in parts_of(self.train, "train"):
            for at, held_out in parts_of(self.held_out, "held_out"):
                yield from _overlap(train_at, train, at, held_out)

    @rule
    def _measured_as_they_are(self) -> Problems:
        for split in self.measured:
            if getattr(getattr(self, split), "weights", None) is not None:
                yield f"{split}.weights", "held-out data is measured as it is: leave the weights out"
            for at in self.curricula(split):
                yield at, "levels rise in training only: held-out problems stay the same"

    @rule
    def _curriculum_makes_problems_anew(self) -> Problems:
        if "train" in self.measured or (self.on_bad_row == "error" and self.filter == LengthFilter()):
            return
        once = "choose among problems that are made once, at the start"
        level = "those of a curriculum change with its level"
        for at in self.curricula("train"):
            reason = f"data.filter and data.on_bad_row = skip {once}; {level}"
            yield at, reason, "filter", "on_bad_row"


def _overlap(train_at: str, train: Any, at: str, held_out: Any) -> Problems:
    """The one rule on what training and held-out data may not share; texts that happen to be the same are
    found when problems are compared (:attr:`megarl.data.prompts.PromptDataset.unseen`)."""
    match train, held_out:
        case (ReasoningGymSource() | EnvironmentSource(), ReasoningGymSource() | EnvironmentSource()):
            (task, seeds), (other_task, other) = train.problems, held_out.problems
            shared = range(max(seeds.start, other.start), min(seeds.stop, other.stop))
            if task == other_task and shared:
                # reasoning-gym makes problem i from the seed `seed + i`, so seeds close by share problems,
                # and with other arguments still random streams.
                both = f"{len(shared)} problems would be in both data.{train_at} and data.held_out"
                use = f"problem i depends on seed + i only; use a seed >= {seeds.stop} (got {other.start})"
                yield f"{at}.seed", f"{both}: {use}", f"{train_at}.seed", f"{train_at}.size"
        case (FileLocation(), FileLocation()) if train.path == held_out.path:
            reason = f"is the same file as data.{train_at}.path (got {held_out.path!r})"
            yield f"{at}.path", reason, f"{train_at}.path"
        case (HfLocation(), HfLocation()) if train.rows == held_out.rows:
            reason = f"is the same split of the same dataset as data.{train_at} (got {held_out.split!r})"
            yield f"{at}.split", reason, f"{train_at}.split", f"{at}.dataset"


class TrainingDataReading(DataReading):
    """What happens to rows, and where their tokens are kept."""

    cache_dir: PathText | None = None
    """Keep tokenised rows here, by content of data, tokenizer and settings; null tokenises at every start."""


class PromptDataConfig(DataReading):
    """Problems to train on and to evaluate with."""

    train: PromptSource
    """Problems GRPO samples from."""
    held_out: PromptSource | None = None
    """Problems only evaluation sees."""
    format: PromptFormat = PromptFormat()
    """How a problem becomes prompt tokens."""
    shuffle: bool = True
    """Shuffle once per epoch, by run.seed."""


class EvalDataConfig(DataReading):
    """Problems to judge answers to."""

    measured: ClassVar[tuple[Split, ...]] = ("train", "held_out")

    held_out: PromptSource
    """Problems."""
    train: PromptSource | None = None
    """The model's training problems, to count the held-out ones that are among them."""
    format: PromptFormat = PromptFormat()
    """How a problem becomes prompt tokens."""


class SftColumns(Section):
    """Which columns make a demonstration; a column that is named here must be there."""

    messages_field: Text | None = None
    """Column with a conversation, assistant turns are learned; null: `messages`, where rows have it."""
    prompt_field: Text | None = None
    """Column with a prompt, not learned; null: `prompt`, where rows have it."""
    response_field: Text | None = None
    """Column with the response to the prompt; null: `response`, where rows have it."""
    text_field: Text | None = None
    """Column with raw text, all of it learned, long ones in chunks; null: `text`, where rows have it."""
    tools_field: Text | None = None
    """Column with tools for the chat template, a list or its JSON; null: `tools`, where rows have it."""


class SftJsonlSource(SftColumns, FileLocation):
    """Demonstrations from a file: rows of messages, of prompt and response, or of text."""


class SftHfSource(SftColumns, HfLocation):
    """Demonstrations from a Hugging Face dataset: rows of messages, of prompt and response, or of text."""


class SftReasoningGymSource(ReasoningGymSource):
    """reasoning-gym problems with their reference answers as demonstrations."""

    response_templates: list[Text] = Field(default=["{answer}"])
    """Forms of the response, each with {answer}; demonstration i uses form i modulo their number."""


PlainSftSource = Annotated[
    SftReasoningGymSource | SftJsonlSource | SftHfSource, Field(discriminator="source")
]


class SftMixtureSource(MixtureWeights):
    """Demonstrations of several sources."""

    sources: Annotated[dict[str, PlainSftSource], Field(min_length=2)]
    """The sources by names of your choice; each is any other kind of source."""


SftSource = Annotated[
    SftReasoningGymSource | SftJsonlSource | SftHfSource | SftMixtureSource, Field(discriminator="source")
]


class SftDataConfig(TrainingDataReading):
    """Demonstrations to learn from and to validate on."""

    train: SftSource
    """Demonstrations."""
    held_out: SftSource | None = None
    """Demonstrations only the validation loss sees."""
    format: PromptFormat = PromptFormat()
    """How a problem becomes prompt tokens."""
    shuffle: bool = True
    """Shuffle once per epoch, by run.seed."""
