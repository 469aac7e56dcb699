"""Read rows of files and Hugging Face datasets, each with its file and line.

A row that cannot be read is yielded as a UserError, for the caller to count or raise; an error of the whole
file is raised. Empty cells (null) of columnar files are missing fields.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.config.data import FileLocation, HfLocation
from megarl.errors import UserError

_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # may begin one: cheaper than a look at every value
_SLICE = 64  # rows of an Arrow table that are Python objects at a time
Row = tuple[str, dict[str, Any] | UserError]
"""Location ("file:line", "file row 3") and the record, or its error."""


def read_rows(source: FileLocation | HfLocation, field: str) -> Iterator[Row]:
    """Yield all rows of a source in order.

    Args:
        source: a file or dataset.
        field: its configuration key, e.g. ``data.train``.

    Raises:
        UserError: a missing or unreadable file or dataset, or no rows.
    """
    if isinstance(source, HfLocation):
        rows, what = _hf_rows(source, field), source.dataset
    else:
        rows, what = _file_rows(source, field), source.path
        field = f"{field}.path"
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UserError(f"{field}: {what} holds no records")


def content_digest(source: FileLocation | HfLocation, field: str) -> str:
    """Return the SHA-256 of the source's content."""
    digest = hashlib.sha256()
    if isinstance(source, FileLocation):
        try:
            _hash_file(Path(source.path), digest)
        except OSError as error:
            raise UserError(f"{field}.path: cannot read {source.path}: {error.strerror}") from error
        return digest.hexdigest()
    dataset = hf_dataset(source, field)
    for file in sorted(entry["filename"] for entry in dataset.cache_files):
        _hash_file(Path(file), digest)
    digest.update(f"{dataset._fingerprint} {source.split} {len(dataset)}".encode())
    return digest.hexdigest()


def _hash_file(path: Path, digest: Any) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def _file_rows(source: FileLocation, field: str) -> Iterator[Row]:
    path = Path(source.path)
    if not path.is_file():
        raise UserError(f"{field}.path: no file {source.path}")
    kind = ".jsonl" if source.source == "jsonl" else path.suffix.lower()
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".arrow": _arrow}
    try:
        yield from readers[kind](source.path)
    except OSError as error:
        raise UserError(f"{field}.path: cannot read {source.path}: {error.strerror or error}") from error


def _jsonl(path: str) -> Iterator[Row]:
    with open(path, "rb") as file:  # not as text: it also splits at carriage returns
        for number, line in enumerate(file, start=1):
            if (row := json_row(path, number, line)) is not None:
                yield row


def json_row(path: str, number: int, line: bytes) -> Row | None:
    """Return the row of a line of a JSONL file, which is its ``number``-th from 1; None if it is blank."""
    where = f"{path}:{number}"
    try:
        text = line.removesuffix(b"\n").decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return where, UserError(f"{where}: not UTF-8 text ({error.reason})")
    if not text.strip():
        return None
    try:
        return where, _as_record(where, read_json(text))
    except json.JSONDecodeError as error:
        return where, UserError(f"{where}: malformed JSON at column {error.colno}: {error.msg}")
    except ValueError as error:
        return where, UserError(f"{where}: {error}")


def _json(path: str) -> Iterator[Row]:
    try:
        records = read_json(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: malformed JSON at column {error.colno}: {error.msg}"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a list of objects, found {type(records).__name__}")
    for index, record in enumerate(records):
        yield f"{path} row {index}", _as_record(f"{path} row {index}", record)


def _csv(path: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default is 128 KiB per cell
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            names = next(reader, [])
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise UserError(f"{path}:1: the column {twice[0]!r} occurs twice")
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if len(cells) == len(names):
                    yield where, {n: c for n, c in zip(names, cells, strict=True) if c != ""}
                elif cells:
                    message = f"{where}: {len(cells)} cells, but the first line names {len(names)} columns"
                    yield where, UserError(message)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text after line {reader.line_num}") from error
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: malformed CSV: {error}") from error


def _parquet(path: str) -> Iterator[Row]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        yield from table_rows(path, ParquetFile(path).iter_batches())
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a readable parquet file: {error}") from error


def _arrow(path: str) -> Iterator[Row]:
    with arrow_batches(path) as batches:
        yield from table_rows(path, batches)


@contextmanager
def arrow_batches(path: str) -> Iterator[Iterator[Any]]:
    """Yield the record batches of an Arrow file, which stays open meanwhile.

    Raises:
        UserError: the file cannot be read.
    """
    import pyarrow as pa

    with pa.memory_map(path) as file:
        try:
            try:
                batches: Any = iter(pa.ipc.open_stream(file))
            except pa.ArrowInvalid:  # the file format instead of the stream format
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            yield batches
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: not a readable Arrow file: {error}") from error


def table_rows(what: str, batches: Any, *, first: int = 0, start: int = 0) -> Iterator[Row]:
    """Yield the rows of Arrow record batches from row ``start`` on; ``first`` is the first's number."""
    for batch in batches:
        for offset in range(max(start - first, 0), len(batch), _SLICE):
            records = batch.slice(offset, _SLICE).to_pylist()
            for index, record in enumerate(records, start=first + offset):
                yield f"{what} row {index}", without_nulls(record)
        first += len(batch)


def _hf_rows(source: HfLocation, field: str) -> Iterator[Row]:
    for index, record in enumerate(hf_dataset(source, field)):
        yield hf_row(source, index, record)


def hf_row(source: HfLocation, index: int, record: dict[str, Any]) -> Row:
    """Return row ``index`` of a Hugging Face dataset."""
    return f"{source.dataset} ({source.split}) row {index}", without_nulls(record)


def hf_dataset(source: HfLocation, field: str, *, streaming: bool = False) -> Any:
    """Return the split of a Hugging Face dataset, with ``streaming`` an IterableDataset.

    Raises:
        UserError: it cannot be read or has no such split.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    path, split = Path(source.dataset), source.split
    saved = path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    at = {"split": split, "revision": source.revision, "streaming": streaming}
    try:
        dataset = load_from_disk(str(path)) if saved else load_dataset(source.dataset, source.subset, **at)
    except Exception as error:  # the library raises some twenty types
        reason = None if streaming else unreachable(error, source.dataset, source.subset)
        raise _cannot_read(source, field, error, reason) from error
    if saved and (source.subset or source.revision):
        name = "subset" if source.subset else "revision"
        raise UserError(f"{field}.{name}: {source.dataset} was saved by save_to_disk and has none")
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise UserError(f"{field}.split: {source.dataset} has {', '.join(dataset)} (got {split!r})")
        dataset = dataset[split]
    elif saved and split != (str(dataset.split) if dataset.split is not None else "train"):
        raise UserError(f"{field}.split: {source.dataset} holds one split, {dataset.split} (got {split!r})")
    return dataset.to_iterable_dataset() if saved and streaming else dataset


def hub_commit(source: HfLocation, field: str) -> str | None:
    """Return the commit of a dataset on the hub; None for one in a local directory.

    Raises:
        UserError: the hub does not answer or has no such dataset.
    """
    from huggingface_hub import HfApi

    if Path(source.dataset).exists():
        return None
    try:
        return HfApi().dataset_info(source.dataset, revision=source.revision).sha
    except Exception as error:  # also those of its HTTP library
        raise _cannot_read(source, field, error) from error


def _cannot_read(
    source: HfLocation, field: str, error: BaseException, reason: str | None = None
) -> UserError:
    reason = reason or " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(f"{field}: cannot read split {source.split!r} of {source.dataset}: {reason}")


def unreachable(error: BaseException, dataset: str, subset: str | None) -> str | None:
    """Return what to run if a data set is not in the cache and the hub out of reach; else None."""
    from datasets import config

    if not isinstance(error, ConnectionError):
        return None
    why = "HF_HUB_OFFLINE is set" if config.HF_HUB_OFFLINE else "the hub does not answer"
    arguments = ", ".join(json.dumps(name) for name in (dataset, subset) if name)
    command = f"python -c 'from datasets import load_dataset; load_dataset({arguments})'"
    return f"not in the cache {config.HF_DATASETS_CACHE}, and {why}; where it can be reached, run `{command}`"


def read_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: an object has a repeated key; the nesting or a number exceeds Python's limits;
            json.JSONDecodeError if it is not JSON.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if _HALF_PAIR.search(text) and (half := _half_pair(value)) is not None:
            raise ValueError(f"holds half of a surrogate pair (in {half!r})")
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    return value


def _half_pair(value: Any) -> str | None:
    """The first string with a surrogate of its own, which no tokenizer takes and no file can hold."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return value[max(0, error.start - 10) : error.end]
        return None
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((half for part in parts if (half := _half_pair(part)) is not None), None)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} occurs twice in an object")
    return found


def without_nulls(value: Any) -> Any:
    """Return a value without null fields: Arrow gives every struct of a column the keys of all others."""
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


def _as_record(where: str, record: Any) -> dict[str, Any] | UserError:
    if isinstance(record, dict):
        return record
    return UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
