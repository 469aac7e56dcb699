"""Where data comes from: problems, demonstrations, and what the sources of both have in common.

A source is one of: ``reasoning_gym`` (generated), ``jsonl`` and ``file`` (files), ``hf`` (Hugging Face
datasets), ``benchmark`` (problems only), or ``mixture``, which draws from several of these. Problems may also
be made by an ``environment``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from megarl.config.benchmarks import BenchmarkSource as BenchmarkSource
from megarl.config.curriculum import CurriculumConfig
from megarl.config.environments import EnvironmentConfig, EnvironmentSource, MathEnvironmentConfig
from megarl.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, Text


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


FILE_KINDS = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
"""Endings of the names of files that can be read."""


class FileLocation(Section):
    """Rows of a file."""

    source: Literal["jsonl", "file"]
    """jsonl reads a JSON object per line; file goes by the ending: .jsonl .json .parquet .csv .arrow."""
    path: Text
    """The file."""


class HfLocation(Section):
    """Rows of a Hugging Face dataset."""

    source: Literal["hf"]
    """Selects this kind of source."""
    dataset: Text
    """Hub name, or a local directory: saved by save_to_disk, or with data files."""
    subset: Text | None = None
    """The dataset's configuration; null is its default."""
    split: Text = "train"
    """Split, slices included, e.g. train[:1000]."""
    revision: Text | None = None
    """Git revision on the hub; null is the newest."""


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


class LengthFilter(Section):
    """Which lengths are kept; what is dropped is counted and shown when a run starts."""

    min_tokens: PositiveInt | None = None
    """Drop what is shorter (problems: the prompt; preference pairs: the shorter of the two)."""
    max_tokens: PositiveInt | None = None
    """Drop what is longer (preference pairs: the longer of the two)."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with that which the run's longest sequence cannot hold."""


class DataReading(Section):
    """What happens to rows that cannot be used."""

    on_bad_row: Literal["error", "skip"] = "error"
    """A malformed row ends the command with the first three; skip leaves it out and reports the same."""
    filter: LengthFilter = LengthFilter()
    """Which lengths are kept."""


class TrainingDataReading(DataReading):
    """What happens to rows, and where their tokens are kept."""

    cache_dir: Text | None = None
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
