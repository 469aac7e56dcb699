"""Rows of a source from any place on, in constant memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megarl.config.data import FileLocation, HfLocation
from megarl.data.rows import Row, arrow_batches, hf_dataset, hf_row, hub_commit, json_row, table_rows
from megarl.errors import UserError

Place = dict[str, Any]
"""Where a row begins, as plain data; {} is the first row."""

_BATCH = 256  # rows of a Parquet file that are decoded at a time
_BUFFER = 2**20  # bytes of each of its columns that are read at a time


class RowReader:
    """Reads the rows of a source in parts.

    Parts that follow each other are read through once. To begin elsewhere seeks in a JSONL file, decodes one
    row group of a Parquet file, and of a Hugging Face dataset reads one of its files.
    """

    def __init__(self, source: FileLocation | HfLocation, field: str) -> None:
        """``field`` is the source's configuration key, e.g. ``data.train``."""
        self._source, self._field = source, field
        self._stream: _RowStream | None = None

    def read(self, place: Place, n: int, tick: Callable[[], None] = lambda: None) -> tuple[list[Row], Place]:
        """Return ``n`` rows from ``place`` on and the place after them; ``tick`` is called at every row.

        If the source ends, they are fewer, and the place is that of its first row.

        Raises:
            UserError: the source cannot be read.
        """
        if self._stream is None or self._stream.place() != place:
            self._stream = _stream_of(self._source, self._field, place)
        try:
            rows = []
            for row in islice(self._stream.rows, n):
                rows.append(row)
                tick()
        except OSError as error:
            what = self._source.path if isinstance(self._source, FileLocation) else self._source.dataset
            raise UserError(f"{self._field}: cannot read {what}: {error.strerror or error}") from error
        return rows, self._stream.place() if len(rows) == n else self._stream.beginning()


class _RowStream(ABC):
    def __init__(self, place: Place) -> None:
        self.rows = self._read(place)

    @abstractmethod
    def _read(self, place: Place) -> Iterator[Row]:
        """Yield the rows from ``place`` on."""

    @abstractmethod
    def place(self) -> Place:
        """Return the place after the last row that was yielded."""

    def beginning(self) -> Place:
        """Return the place of the first row."""
        return {}


def _stream_of(source: FileLocation | HfLocation, field: str, place: Place) -> _RowStream:
    if isinstance(source, HfLocation):
        return _HubStream(source, field, place)
    kind = ".jsonl" if source.source == "jsonl" else Path(source.path).suffix.lower()
    streams: dict[str, Callable[[str, Place], _RowStream]] = {
        ".jsonl": _JsonlStream,
        ".parquet": _ParquetStream,
        ".arrow": _ArrowStream,
    }
    return streams[kind](source.path, place)


class _JsonlStream(_RowStream):
    def __init__(self, path: str, place: Place) -> None:
        self._path, self._line, self._offset = path, place.get("line", 0), place.get("offset", 0)
        super().__init__(place)

    def _read(self, place: Place) -> Iterator[Row]:
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                self._line, self._offset = self._line + 1, self._offset + len(line)
                if (row := json_row(self._path, self._line, line)) is not None:
                    yield row

    def place(self) -> Place:
        return {"line": self._line, "offset": self._offset} if self._line else {}


class _TableStream(_RowStream):
    """Rows of a file of Arrow record batches."""

    def __init__(self, path: str, place: Place) -> None:
        self._path, self._row = path, place.get("row", 0)
        super().__init__(place)

    def _counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self._row += 1
            yield row

    def place(self) -> Place:
        return {"row": self._row} if self._row else {}


class _ParquetStream(_TableStream):
    def _read(self, place: Place) -> Iterator[Row]:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile

        try:
            # Without these two it reads the columns of a row group whole.
            with ParquetFile(self._path, pre_buffer=False, buffer_size=_BUFFER) as file:
                group, first, groups = 0, 0, file.metadata.num_row_groups
                while group < groups and first + file.metadata.row_group(group).num_rows <= self._row:
                    first += file.metadata.row_group(group).num_rows
                    group += 1
                batches = file.iter_batches(batch_size=_BATCH, row_groups=range(group, groups))
                yield from self._counted(table_rows(self._path, batches, first=first, start=self._row))
        except ArrowInvalid as error:
            raise UserError(f"{self._path}: not a readable parquet file: {error}") from error


class _ArrowStream(_TableStream):
    def _read(self, place: Place) -> Iterator[Row]:
        with arrow_batches(self._path) as batches:
            yield from self._counted(table_rows(self._path, batches, start=self._row))


class _HubStream(_RowStream):
    def __init__(self, source: HfLocation, field: str, place: Place) -> None:
        self._row, self._commit = place.get("row", 0), place.get("commit") or hub_commit(source, field)
        # A run goes on with the files that it began with, also where the newest ones are asked for.
        self._source = source.model_copy(update={"revision": self._commit or source.revision})
        self._field = field
        self._dataset = hf_dataset(self._source, field, streaming=True)
        if self._row:
            self._dataset.load_state_dict(place["state"])
        super().__init__(place)

    def _read(self, place: Place) -> Iterator[Row]:
        records = iter(self._dataset)
        while True:
            try:
                record = next(records, None)
            except Exception as error:  # of a file of any format, or of the network
                what = f"{self._source.dataset} ({self._source.split}) after row {self._row}"
                why = " ".join(str(error).split())[:300] or type(error).__name__
                raise UserError(f"{self._field}: cannot read {what}: {why}") from error
            if record is None:
                return
            self._row += 1
            yield hf_row(self._source, self._row - 1, record)

    def place(self) -> Place:
        return {"row": self._row, "state": self._dataset.state_dict(), "commit": self._commit}

    def beginning(self) -> Place:
        return {"commit": self._commit}
