"""Data sources of prompts and demonstrations, and the settings they share.

A source is one of: ``reasoning_gym`` (generated), ``jsonl`` and ``file`` (files), ``hf`` (Hugging Face
datasets), ``benchmark`` (prompts only), or ``mixture``, which draws from several of these. An ``environment``
may also generate prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from megarl.config.benchmarks import BenchmarkSource as BenchmarkSource
from megarl.config.curriculum import CurriculumConfig
from megarl.config.environments import EnvironmentConfig, EnvironmentSource, MathEnvironmentConfig
from megarl.config.row_formats import RowColumns
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
    """Problem i has the seed seed + i; train and held-out ranges [seed, seed + size) must not overlap."""
    extract: Literal["response", "last_number"] = "response"
    """Text to score: the response (its <answer> part if it has one), or the last number in that."""
    partial_credit: bool = True
    """Keep the task's scores below 1 (chain_sum scores 0.5 for 13 instead of 3); false: they become 0."""

    @property
    def problems(self) -> tuple[str, range]:
        """The task and the seeds of its problems."""
        return self.task, range(self.seed, self.seed + self.size)


FILE_KINDS = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
"""Supported file name extensions."""


STREAMED_KINDS = (".jsonl", ".parquet", ".arrow")
"""Of these, those that can be read from the middle."""


class RowLocation(Section):
    """How the rows of a source are read."""

    streaming: bool = False
    """Read windows of rows as training reaches them, for data too large to hold (data.train only)."""
    streaming_window: PositiveInt = 10_000
    """Rows of a window, which are held in memory and shuffled among themselves."""

    @rule
    def _window(self) -> Problems:
        """`streaming_window` needs `streaming`."""
        if not self.streaming:
            yield from self.unused("streaming_window", "all rows are read at the start", "streaming")


class FileLocation(RowLocation):
    """Rows of a file."""

    source: Literal["jsonl", "file"]
    """jsonl: one JSON object per line; file: format by extension, .jsonl .json .parquet .csv .arrow."""
    path: PathText
    """The file."""

    @rule
    def _kind(self) -> Problems:
        """`source: file` needs a `path` that ends in .jsonl, .json, .parquet, .csv or .arrow."""
        if self.source == "file" and PurePath(self.path).suffix.lower() not in FILE_KINDS:
            kinds = ", ".join(FILE_KINDS)
            yield "path", f"its extension selects the format and must be one of {kinds} (got {self.path!r})"

    @rule
    def _kind_streamed(self) -> Problems:
        """`streaming` needs a .jsonl, .parquet or .arrow file."""
        kind = PurePath(self.path).suffix.lower()
        if self.streaming and self.source == "file" and kind in FILE_KINDS and kind not in STREAMED_KINDS:
            kinds = ", ".join(STREAMED_KINDS)
            yield (
                "streaming",
                f"a {kind} file is read whole; {kinds} files can be streamed (got true)",
                "path",
            )


class HfLocation(RowLocation):
    """Rows of a Hugging Face dataset."""

    source: Literal["hf"]
    """Selects this kind of source."""
    dataset: PathText
    """Hub name, or a local directory written by save_to_disk or holding data files."""
    subset: Text | None = None
    """The dataset's configuration; null: its default."""
    split: Text = "train"
    """Split; slices are allowed, e.g. train[:1000]."""
    revision: Text | None = None
    """Git revision on the hub; null: the newest."""

    @property
    def rows(self) -> tuple[str | None, ...]:
        """Identity of the rows: dataset, subset, split, revision."""
        return self.dataset, self.subset, self.split, self.revision

    @rule
    def _split_streamed(self) -> Problems:
        """`streaming` needs a whole `split`."""
        if self.streaming and "[" in self.split:
            yield "streaming", f"needs a whole split (got true and {self.split!r})", "split"


class PromptReasoningGymSource(ReasoningGymSource):
    """Problems of a reasoning-gym task, optionally of rising difficulty."""

    curriculum: CurriculumConfig | None = None
    """Raise the task's level with accuracy (data.train only; saved with the run); null: fixed arguments."""


class PromptColumns(RowColumns):
    """Columns of a prompt source."""

    usable: ClassVar[tuple[str, ...]] = ("prompt", "alpaca")

    prompt_field: Text = "prompt"
    """Field with the prompt (a string, or a list of chat messages)."""
    answer_field: Text = "answer"
    """Field with the reference answer."""
    environment: EnvironmentConfig = MathEnvironmentConfig()
    """The environment that scores responses."""


class JsonlSource(PromptColumns, FileLocation):
    """Prompt/answer pairs from a file: JSONL (one object per line), JSON, parquet, CSV or Arrow."""


class PromptHfSource(PromptColumns, HfLocation):
    """Prompt/answer pairs from a Hugging Face dataset."""


PlainPromptSource = Annotated[
    PromptReasoningGymSource | JsonlSource | PromptHfSource | BenchmarkSource, Field(discriminator="source")
]


class MixtureWeights(Section):
    """Several sources, mixed by weight."""

    source: Literal["mixture"]
    """Selects this kind of source."""
    weights: dict[str, PositiveFloat] | None = None
    """Sampling weight of each source, by its name; null: every row once per epoch."""

    if TYPE_CHECKING:
        sources: Any

    @rule
    def _every_source_once(self) -> Problems:
        """`weights` has exactly the names of `sources`."""
        if self.weights is not None and (differ := sorted(set(self.sources) ^ set(self.weights))):
            reason = "must have the same names as data sources (they differ in {})"
            yield "weights", reason.format(", ".join(differ))


class PromptMixtureSource(MixtureWeights):
    """Prompts from several sources."""

    sources: Annotated[dict[str, PlainPromptSource], Field(min_length=2)]
    """The sources, by names of your choice; each is of any other kind."""


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
    """Formatting of prompts."""

    chat_template: bool | Text = True
    """true: the tokenizer's chat template; chatml, llama3, mistral, gemma, qwen3 or deepseek_r1: this one,
    under which every turn can be learned; a path: the Jinja template in that file; false: bare text."""
    system_prompt: str | None = None
    """First message, with role system (needs the chat template)."""
    prompt_suffix: str = ""
    """Text appended to every prompt, e.g. an instruction on the form of the answer."""

    chat_template_kwargs: dict[Text, bool | int | float | str] = Field(default_factory=dict)
    """Variables that the template reads, e.g. {enable_thinking: false}."""

    @rule
    def _system_prompt(self) -> Problems:
        """`system_prompt` and `chat_template_kwargs` need `chat_template`."""
        if self.system_prompt is not None and not self.chat_template:
            reason = "needs a chat template, but data.format.chat_template is false"
            yield "system_prompt", reason, "chat_template"
        if self.chat_template_kwargs and not self.chat_template:
            yield "chat_template_kwargs", "there is no template to read them", "chat_template"
        for name in self.chat_template_kwargs:
            if not name.isidentifier():
                yield "chat_template_kwargs", f"{name!r} is no name of a variable"


class LengthFilter(Section):
    """Length limits; dropped rows are counted and reported when a run starts."""

    min_tokens: PositiveInt | None = None
    """Drop shorter rows (prompts: by prompt length; preference pairs: by the shorter response)."""
    max_tokens: PositiveInt | None = None
    """Drop longer rows (preference pairs: by the longer response)."""
    too_long: Literal["error", "drop"] = "error"
    """Handling of rows that exceed the run's longest sequence."""

    @rule
    def _lengths(self) -> Problems:
        """`min_tokens` must not exceed `max_tokens`."""
        low, high = self.min_tokens, self.max_tokens
        if low is not None and high is not None and low > high:
            reason = f"larger than data.filter.max_tokens = {high}: every row would be dropped (got {low})"
            yield "min_tokens", reason, "max_tokens"


Split = Literal["train", "held_out"]


def parts_of(source: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Yield the members of a mixture, or the source itself, each with its configuration path."""
    if isinstance(source, MixtureWeights):
        for name, part in getattr(source, "sources", {}).items():
            yield f"{at}.sources.{name}", part
    elif source is not None:
        yield at, source


class DataReading(Section):
    """Treatment of rows that cannot be used."""

    on_bad_row: Literal["error", "skip"] = "error"
    """error: stop at malformed rows and show the first three; skip: drop them with the same report."""
    filter: LengthFilter = LengthFilter()
    """Length limits."""

    measured: ClassVar[tuple[Split, ...]] = ("held_out",)
    """The splits that are evaluated, never trained on."""
    if TYPE_CHECKING:  # each data section has these, with its own types of source
        train: Any
        held_out: Any
        format: PromptFormat

    def curricula(self, split: Split) -> list[str]:
        """Return the configuration paths of the curricula in a split."""
        found = parts_of(getattr(self, split), split)
        return [f"{at}.curriculum" for at, part in found if getattr(part, "curriculum", None) is not None]

    @rule
    def _separate_splits(self) -> Problems:
        """`train` and `held_out` must not be the same rows: other seeds, another file or another split."""
        for train_at, train in parts_of(self.train, "train"):
            for at, held_out in parts_of(self.held_out, "held_out"):
                yield from _overlap(train_at, train, at, held_out)

    def streamed(self, split: Split) -> list[str]:
        """Return the configuration paths of the streamed sources in a split."""
        found = parts_of(getattr(self, split), split)
        return [at for at, part in found if getattr(part, "streaming", False)]

    @rule
    def _streams(self) -> Problems:
        """Only `data.train` can be streamed, as a single source."""
        for split in self.measured:
            for at in self.streamed(split):
                yield f"{at}.streaming", "rows to be evaluated are read whole: remove it (got true)"
        if "train" not in self.measured and isinstance(self.train, MixtureWeights):
            for at in self.streamed("train"):
                why = "the sources of a mixture are read whole; stream one source (got true)"
                yield f"{at}.streaming", why, "train.source"

    @rule
    def _fixed_held_out(self) -> Problems:
        """Held-out data has no `weights` and no `curriculum`."""
        for split in self.measured:
            if getattr(getattr(self, split), "weights", None) is not None:
                yield f"{split}.weights", "held-out data is evaluated once per row: remove the weights"
            for at in self.curricula(split):
                yield at, "a curriculum applies to training only: held-out problems must stay the same"

    @rule
    def _no_filter_with_curriculum(self) -> Problems:
        """A `curriculum` cannot be combined with `data.filter` or `on_bad_row: skip`."""
        if "train" in self.measured or (self.on_bad_row == "error" and self.filter == LengthFilter()):
            return
        once = "select among problems generated once, at the start"
        level = "a curriculum generates them anew at each level"
        for at in self.curricula("train"):
            reason = f"data.filter and data.on_bad_row = skip {once}; {level}"
            yield at, reason, "filter", "on_bad_row"


def _overlap(train_at: str, train: Any, at: str, held_out: Any) -> Problems:
    """Rule: training and held-out data come from different seeds, files or splits.

    Equal texts in different sources are found later (:attr:`megarl.data.prompts.PromptDataset.unseen`).
    """
    match train, held_out:
        case (ReasoningGymSource() | EnvironmentSource(), ReasoningGymSource() | EnvironmentSource()):
            (task, seeds), (other_task, other) = train.problems, held_out.problems
            shared = range(max(seeds.start, other.start), min(seeds.stop, other.stop))
            if task == other_task and shared:
                # reasoning-gym generates problem i from the seed `seed + i`: overlapping seed ranges share
                # problems, and with other arguments still share random streams.
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
    """Treatment of rows, and the token cache."""

    cache_dir: PathText | None = None
    """Token cache, keyed by the content of data, tokenizer and settings; null: tokenise at every start."""

    @rule
    def _no_cache_of_streams(self) -> Problems:
        """`cache_dir` needs data that is not streamed."""
        for at in self.streamed("train") if self.cache_dir is not None else ():
            why = f"keeps the tokens of all rows, and data.{at}.streaming reads them as it goes"
            yield "cache_dir", f"{why} (got {self.cache_dir!r})", f"{at}.streaming"


class PromptDataConfig(DataReading):
    """Prompts for training and evaluation."""

    train: PromptSource
    """Training prompts."""
    held_out: PromptSource | None = None
    """Prompts for evaluation only."""
    format: PromptFormat = PromptFormat()
    """Formatting of prompts."""
    shuffle: bool = True
    """Shuffle once per epoch, by run.seed."""


class EvalDataConfig(DataReading):
    """Prompts for evaluation."""

    measured: ClassVar[tuple[Split, ...]] = ("train", "held_out")

    held_out: PromptSource
    """Prompts to evaluate."""
    train: PromptSource | None = None
    """The model's training prompts, to count held-out prompts that are among them."""
    format: PromptFormat = PromptFormat()
    """Formatting of prompts."""


class SftColumns(RowColumns):
    """Columns of a demonstration; a column named here must exist."""

    usable: ClassVar[tuple[str, ...]] = (
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_response",
        "prompt_completion",
        "text",
    )

    messages_field: Text | None = None
    """Column with a conversation; the loss covers assistant turns. null: `messages`, if rows have it."""
    prompt_field: Text | None = None
    """Column with a prompt, which has no loss; null: `prompt`, if rows have it."""
    response_field: Text | None = None
    """Column with the response to the prompt; null: `response`, if rows have it."""
    text_field: Text | None = None
    """Column with raw text, all in the loss; long texts are split. null: `text`, if rows have it."""
    tools_field: Text | None = None
    """Column with tools for the chat template, a list or its JSON; null: `tools`, if rows have it."""

    @property
    def names_pair(self) -> bool:
        """Whether a column of prompts or responses is named."""
        return bool(self.prompt_field or self.response_field)

    @rule
    def _columns_of_the_format(self) -> Problems:
        """With a row_format, only columns of that format have a name."""
        reads = {
            "messages": ("messages_field",),
            "sharegpt": ("messages_field",),
            "alpaca": (),
            "prompt_completion": ("prompt_field", "response_field"),
            "prompt_response": ("prompt_field", "response_field"),
            "text": ("text_field",),
        }
        if self.row_format not in reads:
            return
        for name in ("messages_field", "prompt_field", "response_field", "text_field"):
            if name not in reads[self.row_format]:
                why = f"rows of format {self.row_format} have no such column"
                yield from self.unused(name, why, "row_format")


class SftJsonlSource(SftColumns, FileLocation):
    """Demonstrations from a file: rows of messages, of prompt and response, or of text."""


class SftHfSource(SftColumns, HfLocation):
    """Demonstrations from a Hugging Face dataset: rows of messages, of prompt and response, or of text."""


class SftReasoningGymSource(ReasoningGymSource):
    """Demonstrations made of reasoning-gym problems and their reference answers."""

    response_templates: list[Text] = Field(default=["{answer}"])
    """Templates of the response, each with {answer}; demonstration i uses template i modulo their number."""


PlainSftSource = Annotated[
    SftReasoningGymSource | SftJsonlSource | SftHfSource, Field(discriminator="source")
]


class SftMixtureSource(MixtureWeights):
    """Demonstrations from several sources."""

    sources: Annotated[dict[str, PlainSftSource], Field(min_length=2)]
    """The sources, by names of your choice; each is of any other kind."""


SftSource = Annotated[
    SftReasoningGymSource | SftJsonlSource | SftHfSource | SftMixtureSource, Field(discriminator="source")
]


class SftDataConfig(TrainingDataReading):
    """Demonstrations for training and validation."""

    train: SftSource
    """Training demonstrations."""
    held_out: SftSource | None = None
    """Demonstrations for the validation loss only."""
    learned_turns: Literal["all", "last"] = "all"
    """Of a conversation, learn all of the assistant's turns, or the last one only."""
    format: PromptFormat = PromptFormat()
    """Formatting of prompts."""
    shuffle: bool = True
    """Shuffle once per epoch, by run.seed."""
