"""Prompt datasets: reasoning-gym tasks (generated on access), rows of files, benchmarks, environments."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from megarl.config.data import (
    BenchmarkSource,
    EvalDataConfig,
    FileLocation,
    HfLocation,
    JsonlSource,
    PlainPromptSource,
    PromptColumns,
    PromptDataConfig,
    PromptFormat,
    PromptHfSource,
    PromptMixtureSource,
    PromptReasoningGymSource,
    PromptSource,
    ReasoningGymSource,
)
from megarl.config.environments import EnvironmentSource, MathEnvironmentConfig, ToolsConfig
from megarl.data import benchmarks
from megarl.data.load import Converted, collect, locate, reads_everything
from megarl.data.report import LoadReport, TooLongError
from megarl.data.row_fields import get_field, get_text, get_text_or_messages
from megarl.data.row_formats import instruction, recognise
from megarl.data.rows import Row, read_rows
from megarl.data.stream import ExampleStream, Streamed
from megarl.data.tokenizer import chat_ids
from megarl.data.tool_prompts import PromptTools
from megarl.environments import make_environment, needs_answer, wrong_references
from megarl.environments.curriculum import Curricula, Curriculum, first_dataset
from megarl.environments.tasks import make_dataset
from megarl.environments.text import number_text
from megarl.errors import UserError
from megarl.records import Prompt, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "held_out"]

# Generated problems up to this index are checked at load, the others when they are drawn.
NUM_CHECKED_AT_LOAD = 256
# Finding overlap with generated training problems means generating all, 0.1 ms to 0.1 s each. The limit is
# a count, not a time: the prompts of an evaluation must not depend on the load of the machine.
MAX_COMPARED_PROBLEMS = 10_000


class PromptDataset(ABC, Sequence[Prompt]):
    """Prompts by index, deterministic.

    ``prompt.text`` includes the chat template; ``prompt.metadata`` has ``question`` (the bare text),
    ``answer`` (the reference, "" if there is none) and ``entry`` (the reasoning-gym entry or the row); in a
    mixture also ``source``, the name of the source. ``reports`` has a LoadReport per source; ``parts`` and
    ``stream`` are as in megarl.data.order.
    """

    is_mixture = False
    stream: ExampleStream[PromptDataset] | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat,
        max_prompt_tokens: int,
        field: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._format = prompt_format
        self._max_prompt_tokens = max_prompt_tokens
        self._field = field
        self.reports: list[LoadReport] = []
        self.parts: list[tuple[int, float]] = []
        self.curriculum: Curriculum | Curricula | None = None
        self._tools: PromptTools | None = None  # tools of the environment
        self._train: PromptSource | None = None  # training source, for `unseen`; None in the training split

    @abstractmethod
    def questions(self) -> Iterator[str]:
        """Yield the bare texts in order, without suffix and chat template."""

    @abstractmethod
    def _prompt(self, index: int) -> Prompt:
        """Return the prompt at ``index`` in [0, len)."""

    def check(self) -> None:
        """Raise UserError at load for errors that would occur when prompts are generated later."""

    @property
    def starts(self) -> list[int]:
        """Index of the first prompt of each source: of a mixture's, in order, else [0]."""
        return [0]

    @property
    def overlap(self) -> int | None:
        """Number of texts that also occur in the training data; None as for ``unseen``."""
        return None if self.unseen is None else len(self) - len(self.unseen)

    @functools.cached_property
    def unseen(self) -> list[int] | None:
        """Indices of the prompts whose text does not occur in the training data.

        For the training split all of them. None if they are not compared (:attr:`not_compared`).
        """
        if self._train is None:
            return list(range(len(self)))
        if self.not_compared:
            return None
        train = set(questions_of(self._train, "data.train"))
        return [i for i, question in enumerate(self.questions()) if question not in train]

    @property
    def not_compared(self) -> str | None:
        """Why the prompts are not compared with the training data, if they are not.

        More than MAX_COMPARED_PROBLEMS problems would have to be generated, or the data is streamed. Other
        files are compared whatever their size.
        """
        for part, at in _plain_parts(self._train, "data.train") if self._train is not None else ():
            if isinstance(part, ReasoningGymSource) and part.size > MAX_COMPARED_PROBLEMS:
                return f"there are more than {MAX_COMPARED_PROBLEMS} of them ({at}.size)"
            if isinstance(part, FileLocation | HfLocation) and part.streaming:
                return f"they are streamed ({at}.streaming)"
        return None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        return self._prompt(index % len(self))

    def _make(
        self, index: int, where: str, problem: str | list[dict[str, str]], metadata: dict[str, Any]
    ) -> Prompt:
        """Tokenise one prompt; ``where`` is the prefix of UserErrors."""
        if self._format.chat_template:
            messages = self._messages(where, problem)
            tools: list[dict[str, Any]] | None = None
            if self._tools is not None:
                messages, tools = self._tools.put_in(messages)
                metadata = metadata | {"tool_format": self._tools.format.as_dict()}
            try:
                ids = chat_ids(self._tokenizer, messages, add_generation_prompt=True, tools=tools)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from error
            text = str(
                self._tokenizer.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=True, tokenize=False
                )
            )
        else:
            if not isinstance(problem, str):
                raise UserError(f"{where}: chat messages need data.format.chat_template: true")
            text = problem + self._format.prompt_suffix
            ids = list(self._tokenizer(text)["input_ids"])
        if not ids:
            raise UserError(f"{where}: the prompt has no tokens")
        if len(ids) > self._max_prompt_tokens:
            raise TooLongError(
                f"{where}: the prompt has {len(ids)} tokens, but at most {self._max_prompt_tokens} are "
                "allowed (longest sequence minus rollout.max_new_tokens)"
            )
        return Prompt(index=index, text=text, token_ids=token_ids(ids), metadata=metadata)

    def _messages(self, where: str, problem: str | list[dict[str, str]]) -> list[dict[str, str]]:
        messages = (
            [{"role": "user", "content": problem}]
            if isinstance(problem, str)
            else [dict(message) for message in problem]
        )
        if messages[-1]["role"] != "user":
            raise UserError(f"{where}: the last chat message must have role 'user'")
        messages[-1]["content"] += self._format.prompt_suffix
        if self._format.system_prompt is not None:
            if messages[0]["role"] == "system":
                raise UserError(f"{where}: has a system message, and data.format.system_prompt is set too")
            messages.insert(0, {"role": "system", "content": self._format.system_prompt})
        return messages


class _SeededPrompts(PromptDataset):
    """Prompts generated one by one, ``size`` in all."""

    def __init__(self, source: PromptReasoningGymSource | EnvironmentSource, *args: Any) -> None:
        super().__init__(*args)
        self._source = source

    def check(self) -> None:
        """Generate the first prompts."""
        for index in range(min(len(self), NUM_CHECKED_AT_LOAD)):
            self._prompt(index)

    def __len__(self) -> int:
        return self._source.size

    def questions(self) -> Iterator[str]:
        """Yield the texts; for games, whose first texts may be equal, a text with the seed."""
        return questions_of(self._source, self._field)


class _ReasoningGymPrompts(_SeededPrompts):
    _source: PromptReasoningGymSource

    def __init__(self, source: PromptReasoningGymSource, *args: Any) -> None:
        super().__init__(source, *args)
        if source.curriculum is None:
            self._dataset = make_dataset(source, self._field)
        else:
            self.curriculum = self._levels = Curriculum(source, source.curriculum, self._field)

    def _prompt(self, index: int) -> Prompt:
        rises = self._source.curriculum is not None
        entry = self._levels.entry(index) if rises else self._dataset[index]
        metadata = {"question": entry["question"], "answer": entry["answer"], "entry": entry}
        if rises:
            metadata["level"] = self._levels.level
        return self._make(index, f"{self._field}: problem {index}", entry["question"], metadata)


class _EnvironmentPrompts(_SeededPrompts):
    """Prompts generated by the environment, identified by their seeds."""

    _source: EnvironmentSource

    def __init__(self, source: EnvironmentSource, *args: Any) -> None:
        super().__init__(source, *args)
        self._maker: Any = make_environment(source.environment, f"{self._field}.environment")
        if not callable(getattr(self._maker, "problem", None)):
            raise UserError(
                f"{self._field}.environment: {type(self._maker).__name__} has no method problem(seed),"
                " so it cannot generate problems"
            )

    def _prompt(self, index: int) -> Prompt:
        made = self._maker.problem(self._source.seed + index)
        metadata = {"question": made.text, "answer": made.answer, **made.metadata}
        return self._make(index, f"{self._field}: problem {index}", made.text, metadata)


class _RowPrompts(PromptDataset):
    """Prompts of rows: of all of a file or Hugging Face dataset, or of a window of one.

    The rows of a window come after ``before`` prompts, and need not hold one.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        columns: PromptColumns,
        reading: PromptDataConfig | EvalDataConfig,
        report: LoadReport,
        *args: Any,
        whole: bool = True,
        before: int = 0,
    ) -> None:
        super().__init__(*args)
        self._columns = columns
        if isinstance(columns.environment, ToolsConfig):
            self._tools = PromptTools.of(columns.environment.tools, self._tokenizer)
        self.reports = [report]
        found = list(collect(rows, self._convert, reading, report, whole=whole))
        # The environment decides which references it can use.
        lines = (
            (f"{where}: field {columns.answer_field!r}", prompt.metadata["answer"], prompt.metadata["entry"])
            for where, prompt in found
        )
        wrong = dict(wrong_references(columns.environment, f"{self._field}.environment", lines))
        problems = report if reading.on_bad_row == "skip" else LoadReport(self._field)
        for message in wrong.values():
            problems.bad.add(message)
        if problems.bad.count and problems is not report:
            raise problems.fail()
        report.num_used -= len(wrong)
        kept = [prompt for i, (_, prompt) in enumerate(found) if i not in wrong]
        if whole and not kept:
            raise UserError("\n".join([f"{self._field}: no row is left to use", *report.lines()]))
        self._prompts = [replace(prompt, index=index) for index, prompt in enumerate(kept, start=before)]

    def _convert(self, where: str, record: dict[str, Any]) -> Converted[tuple[str, Prompt]]:
        columns = self._columns
        problem: str | list[dict[str, Any]]
        record = _with_prompt(record, columns, where)
        problem = get_text_or_messages(record, columns.prompt_field, where)
        answer = ""
        if columns.answer_field in record or needs_answer(columns.environment):
            answer = _reference(record, columns.answer_field, where)
        question = problem if isinstance(problem, str) else problem[-1]["content"]
        metadata = {"question": question, "answer": answer, "entry": record}
        if _is_number(record.get(columns.answer_field)):
            metadata["answer_is_number"] = True
        prompt = self._make(0, where, problem, metadata)
        return Converted([(where, prompt)], len(prompt.token_ids), len(prompt.token_ids))

    def __len__(self) -> int:
        return len(self._prompts)

    def questions(self) -> Iterator[str]:
        return (_question(prompt.metadata["entry"][self._columns.prompt_field]) for prompt in self._prompts)

    def _prompt(self, index: int) -> Prompt:
        return self._prompts[index]


class _StreamedPrompts(Streamed, PromptDataset):
    def __init__(self, stream: ExampleStream[PromptDataset], *args: Any) -> None:
        super().__init__(*args)
        self.stream = stream
        stream.tell = self.reports.append

    def questions(self) -> Iterator[str]:
        """Raise TypeError: they have no end."""
        raise TypeError("a stream has no end")

    def _prompt(self, index: int) -> Prompt:
        prompt: Prompt = self.stream[index]
        return prompt


def _with_prompt(record: dict[str, Any], columns: PromptColumns, where: str) -> dict[str, Any]:
    """Return the row with its prompt and answer where ``columns`` says, whatever its format."""
    if any(columns.changed("prompt_field")):
        return record
    form = "prompt" if "prompt" in record and columns.row_format == "auto" else None
    form = form or recognise(record, where, columns.usable, columns.row_format)
    if form != "alpaca":
        return record
    if unread := [name for name in ("system", "history") if record.get(name)]:
        raise UserError(f"{where}: field {unread[0]!r} of an Alpaca row has no place in a prompt")
    return {columns.answer_field: record["output"], **record, "prompt": instruction(record, where)}


def _question(problem: Any) -> str:
    """Return the text to compare by; a chat is compared by its messages."""
    return problem if isinstance(problem, str) else repr(problem)


class _BenchmarkPrompts(PromptDataset):
    def __init__(self, source: BenchmarkSource, *args: Any) -> None:
        super().__init__(*args)
        self._questions = benchmarks.load_questions(source, self._field)
        if isinstance(source.environment, MathEnvironmentConfig):
            where = f"{self._field}: row"
            lines = ((f"{where} {i}", q.answer, q.metadata) for i, q in enumerate(self._questions))
            for _, message in wrong_references(source.environment, where, lines):
                raise UserError(message)

    def check(self) -> None:
        """Generate all prompts."""
        for index in range(len(self)):
            self._prompt(index)

    def __len__(self) -> int:
        return len(self._questions)

    def questions(self) -> Iterator[str]:
        return (question.text for question in self._questions)

    def _prompt(self, index: int) -> Prompt:
        question = self._questions[index]
        metadata = {"question": question.text, "answer": question.answer, "category": question.category}
        metadata |= question.metadata
        return self._make(index, f"{self._field}: row {index}", question.text, metadata)


def _reference(record: dict[str, Any], name: str, where: str) -> str:
    """Return the reference answer as text; JSON numbers are converted: 42.0 to "42", 1e-05 to "0.00001"."""
    value = get_field(record, name, where)
    if not _is_number(value):
        return get_text(record, name, where)
    if not math.isfinite(value):
        raise UserError(f"{where}: field {name!r} is {value}, not an answer")
    return number_text(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


class _KeptPrompts(PromptDataset):
    """Prompts of another dataset that passed the filters and are not bad rows."""

    def __init__(self, base: PromptDataset, reading: PromptDataConfig | EvalDataConfig, *args: Any) -> None:
        super().__init__(*args)
        report = LoadReport(self._field)
        self.reports = [report]

        def convert(_where: str, row: dict[str, Any]) -> Converted[int]:
            length = len(base._prompt(row["index"]).token_ids)
            return Converted([row["index"]], length, length)

        rows = ((f"{self._field}: problem {i}", {"index": i}) for i in range(len(base)))
        self._base, self._indices = base, list(collect(rows, convert, reading, report))

    def __len__(self) -> int:
        return len(self._indices)

    def questions(self) -> Iterator[str]:
        """Yield the texts of the kept prompts."""
        kept = set(self._indices)
        return (question for i, question in enumerate(self._base.questions()) if i in kept)

    def _prompt(self, index: int) -> Prompt:
        return replace(self._base._prompt(self._indices[index]), index=index)


class _MixedPrompts(PromptDataset):
    """Concatenated datasets."""

    is_mixture = True

    def __init__(self, sets: dict[str, PromptDataset], weights: dict[str, float] | None, *args: Any) -> None:
        super().__init__(*args)
        self._names, self._sets = list(sets), list(sets.values())
        self._sizes = [len(each) for each in self._sets]
        self._starts = [sum(self._sizes[:k]) for k in range(len(self._sizes))]
        self.reports = [report for each in self._sets for report in each.reports]
        levels = {
            name: each.curriculum for name, each in sets.items() if isinstance(each.curriculum, Curriculum)
        }
        self.curriculum = Curricula(levels) if levels else None
        if weights is not None:
            self.parts = [(len(each), weights[name]) for name, each in sets.items()]

    def __len__(self) -> int:
        return sum(self._sizes)

    @property
    def starts(self) -> list[int]:
        """Index of the first prompt of each source."""
        return self._starts

    def questions(self) -> Iterator[str]:
        """Yield the texts of all datasets in turn."""
        return itertools.chain.from_iterable(each.questions() for each in self._sets)

    def _prompt(self, index: int) -> Prompt:
        part, row = locate(index, self._sizes)
        prompt = self._sets[part]._prompt(row)
        metadata = {**prompt.metadata, "source": self._names[part]}
        if metadata.get("category") is None:  # evaluations then report each source separately
            metadata["category"] = self._names[part]
        return replace(prompt, index=index, metadata=metadata)


def load_prompts(
    config: PromptDataConfig | EvalDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    split: Split,
) -> PromptDataset:
    """Load the prompts of one split, each at most ``max_prompt_tokens`` tokens long.

    Files are checked completely. Of generated problems the first NUM_CHECKED_AT_LOAD are checked here, the
    others when they are drawn.

    Raises:
        UserError: unknown task or argument, file errors with their line, a reference that cannot be parsed, a
            prompt that is too long (with its index or line, its length and the limit).
    """
    source = config.train if split == "train" else config.held_out
    if source is None:
        raise UserError(f"data.{split}: missing")
    field = f"data.{split}"
    if isinstance(source, PromptMixtureSource):
        sets = {
            name: _load_plain(part, config, tokenizer, max_prompt_tokens, f"{field}.sources.{name}")
            for name, part in source.sources.items()
        }
        dataset: PromptDataset = _MixedPrompts(
            sets, source.weights, tokenizer, config.format, max_prompt_tokens, field
        )
    else:
        dataset = _load_plain(source, config, tokenizer, max_prompt_tokens, field)
    if split == "held_out":
        dataset._train = config.train
    return dataset


def _load_plain(
    source: PlainPromptSource | EnvironmentSource,
    config: PromptDataConfig | EvalDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    field: str,
) -> PromptDataset:
    arguments = (tokenizer, config.format, max_prompt_tokens, field)
    dataset: PromptDataset
    if isinstance(source, ReasoningGymSource):
        dataset = _ReasoningGymPrompts(source, *arguments)
    elif isinstance(source, BenchmarkSource):
        dataset = _BenchmarkPrompts(source, *arguments)
    elif isinstance(source, EnvironmentSource):
        dataset = _EnvironmentPrompts(source, *arguments)
    else:
        return _load_rows(source, config, field, *arguments)
    if reads_everything(config):
        return _KeptPrompts(dataset, config, *arguments)
    dataset.check()
    return dataset


def _load_rows(
    source: JsonlSource | PromptHfSource,
    config: PromptDataConfig | EvalDataConfig,
    field: str,
    *arguments: Any,
) -> PromptDataset:
    if not source.streaming:
        return _RowPrompts(read_rows(source, field), source, config, LoadReport(field), *arguments)

    def window(rows: Iterable[Row], report: LoadReport, before: int) -> PromptDataset:
        return _RowPrompts(rows, source, config, report, *arguments, whole=False, before=before)

    return _StreamedPrompts(ExampleStream(source, field, window), *arguments)


def _plain_parts(source: PromptSource, field: str) -> list[tuple[PlainPromptSource | EnvironmentSource, str]]:
    if isinstance(source, PromptMixtureSource):
        return [(part, f"{field}.sources.{name}") for name, part in source.sources.items()]
    return [(source, field)]


def questions_of(source: PromptSource, field: str) -> Iterator[str]:
    """Yield the bare texts of a source, in order; a chat as its messages."""
    for part, place in _plain_parts(source, field):
        if isinstance(part, ReasoningGymSource):
            dataset = first_dataset(part, place)
            yield from (str(dataset[index]["question"]) for index in range(len(dataset)))
        elif isinstance(part, BenchmarkSource):
            yield from (question.text for question in benchmarks.load_questions(part, place))
        elif isinstance(part, EnvironmentSource):  # by seed: the first texts of games may be equal
            yield from (f"problem of seed {part.seed + index}" for index in range(part.size))
        else:
            for _, record in read_rows(part, place):
                try:  # bad rows: reported at load
                    record = _with_prompt(record, part, "") if isinstance(record, dict) else {}
                except UserError:
                    continue
                if part.prompt_field in record:
                    yield _question(record[part.prompt_field])
