"""Convert rows to items: count bad rows, filter by length, cache tokens; for every kind of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from megarl.config.data import (
    DataReading,
    FileLocation,
    HfLocation,
    LengthFilter,
    ReasoningGymSource,
    TrainingDataReading,
)
from megarl.data.report import LoadReport, TooLongError
from megarl.data.rows import Row, content_digest
from megarl.data.store import TokenCache, TokenStore, tokenizer_digest
from megarl.errors import UserError
from megarl.records import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Converted(Generic[_Item]):
    """Items of one row, with the shortest and longest length in tokens that filters compare."""

    items: list[_Item]
    shortest: int
    longest: int


def collect(
    rows: Iterable[Row],
    convert: Callable[[str, dict[str, Any]], Converted[_Item]],
    reading: DataReading,
    report: LoadReport,
    *,
    whole: bool = True,
) -> Iterator[_Item]:
    """Yield the items of all usable rows, in order; ``report`` counts the other rows.

    ``convert`` raises UserError for a malformed row and TooLongError for one that is too long. ``whole``:
    these are all rows of a source, of which some must be usable.

    Raises:
        UserError: after all rows, with the first three bad ones, unless data.on_bad_row is skip; or no row is
            left.
    """
    problems = LoadReport(report.key)  # rows that are errors
    for where, record in rows:
        report.num_rows += 1
        try:
            if isinstance(record, UserError):
                raise record
            converted = convert(where, record)
        except TooLongError as error:
            if reading.filter.too_long == "drop":
                report.dropped.add(str(error))
            else:
                problems.bad.add(str(error))
            continue
        except UserError as error:
            (report if reading.on_bad_row == "skip" else problems).bad.add(str(error))
            continue
        if reason := _outside(converted, reading.filter):
            report.dropped.add(f"{where}: {reason}")
            continue
        report.num_used += 1
        yield from converted.items
    if problems.bad.count:
        raise problems.fail()
    if whole and not report.num_used:
        raise UserError("\n".join([f"{report.key}: no row is left to use", *report.lines()]))


def _outside(converted: Converted[Any], limits: LengthFilter) -> str | None:
    if limits.min_tokens is not None and converted.shortest < limits.min_tokens:
        return f"{converted.shortest} tokens, fewer than data.filter.min_tokens = {limits.min_tokens}"
    if limits.max_tokens is not None and converted.longest > limits.max_tokens:
        return f"{converted.longest} tokens, more than data.filter.max_tokens = {limits.max_tokens}"
    return None


def reads_everything(reading: DataReading) -> bool:
    """Return whether settings need every generated problem at the start."""
    limits = reading.filter
    return (
        reading.on_bad_row == "skip"
        or limits != LengthFilter()
        or (isinstance(reading, TrainingDataReading) and reading.cache_dir is not None)
    )


def load_tokens(
    source: FileLocation | HfLocation | ReasoningGymSource,
    reading: TrainingDataReading,
    tokenizer: PreTrainedTokenizerBase,
    kind: dict[str, Any],
    field: str,
    sequences: Callable[[LoadReport], Iterator[TokenSequence]],
) -> tuple[TokenStore, LoadReport]:
    """Return the tokens of a source from the cache, else from ``sequences(report)``, and cache them.

    ``kind`` completes the cache key: whatever affects the tokens besides source, reading and tokenizer.
    """
    report = LoadReport(field)
    if reading.cache_dir is None:
        return TokenStore.of(sequences(report)), report
    settings = reading.model_dump(mode="json", include={"format", "filter", "on_bad_row"})
    depends_on = kind | settings | {"field": field, "source": source.model_dump(mode="json")}
    depends_on["tokenizer"] = tokenizer_digest(tokenizer)
    if isinstance(source, ReasoningGymSource):
        from importlib.metadata import version

        depends_on["content"] = f"reasoning-gym {version('reasoning-gym')}"
    else:
        depends_on["content"] = content_digest(source, field)
    cache = TokenCache(reading.cache_dir, depends_on)
    if (kept := cache.read()) is not None:
        store, report = kept
        report.cache = f"{field}: tokens of {len(store)} sequences read from {cache.path}"
        return store, report
    damaged = cache.path.is_file()
    store = TokenStore.of(sequences(report))
    cache.write(store, report)
    report.cache = f"{field}: tokens of {len(store)} sequences written to {cache.path}"
    if damaged:
        report.cache += " (it was damaged)"
    return store, report


def locate(index: int, sizes: list[int]) -> tuple[int, int]:
    """Return (dataset, row) of ``index`` in concatenated datasets of these sizes; raise IndexError."""
    for part, size in enumerate(sizes):
        if index < size:
            return part, index
        index -= size
    raise IndexError(index)
