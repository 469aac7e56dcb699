"""timeline/rank_N.jsonl: when the phases of each step began and ended on every rank.

A line per step: ``{"step", "start", "seconds", "spans"}``, ``start`` in Unix time, ``spans`` a list of
``[depth, name, begin, end]`` in seconds since ``start``, depth 0 outermost. Each rank writes its own file, so
that no step waits for it.
"""

from __future__ import annotations

import json
import mmap
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from megarl.errors import UserError
from megarl.files import naming
from megarl.run_directory import to_json

_NAME = re.compile(r"rank_(\d+)\.jsonl")
_FLUSH_SECONDS = 1.0


class TimelineWriter:
    """Appends this rank's lines.

    Args:
        folder: <run.dir>/timeline, on a file system that all ranks share.
        rank, world_size: of this process.
        after: the step that the run goes on after, -1 for none; later lines are removed, also from the files
            of ranks that this run no longer has.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, after: int) -> None:
        for other, path in _files(folder).items():
            if other % world_size == rank:
                _cut(path, after)
        self._path = rank_file(folder, rank)
        with naming(self._path):
            self._handle: IO[str] = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (close() closes it)
        self._flushed = time.monotonic()

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Append the line of ``step``; on disk after a second, or at :meth:`close`."""
        with naming(self._path):
            self._handle.write(to_json({"step": step, **row}, separators=(",", ":")) + "\n")
            if (now := time.monotonic()) - self._flushed > _FLUSH_SECONDS:
                self._handle.flush()
                self._flushed = now

    def close(self) -> None:
        """Write what is left and close the file."""
        with naming(self._path):
            self._handle.close()


def rank_file(folder: Path, rank: int) -> Path:
    """Return the path of a rank's file."""
    return folder / f"rank_{rank:05}.jsonl"


def read_timeline(
    run_dir: Path, steps: Iterable[int], max_bytes: int
) -> dict[int, dict[int, dict[str, Any]]]:
    """Return step -> rank -> the rank's line, for the first of ``steps`` that fit into ``max_bytes``.

    Lines are found by bisection: a long file is not read. A step that no rank has is left out.

    Raises:
        UserError: a line that was looked at is not valid JSON with a step.
    """
    files = {rank: _Lines(path) for rank, path in sorted(_files(run_dir / "timeline").items())}
    found: dict[int, dict[int, dict[str, Any]]] = {}
    room = max_bytes
    for step in steps:
        lines = {rank: line for rank, file in files.items() if (line := file.find(step)) is not None}
        room -= sum(map(len, lines.values()))
        if room < 0:
            break
        if lines:
            found[step] = {rank: json.loads(line) for rank, line in lines.items()}
    return found


class _Lines:
    """The lines of a file, ascending by step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as handle:
            empty = path.stat().st_size == 0
            self._data: bytes | mmap.mmap = (
                b"" if empty else mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            )
        self._end = self._data.rfind(b"\n") + 1  # a last line without its end is still being written

    def find(self, step: int) -> bytes | None:
        """Return the line of ``step``, None if there is none."""
        start = self.after(step - 1)
        end = self._data.find(b"\n", start)
        return self._data[start:end] if start < self._end and self._step(start, end) == step else None

    def after(self, step: int) -> int:
        """Return the offset of the first line of a later step; the end of the last line if there is none."""
        low, high = 0, self._end
        while low < high:  # both are beginnings of lines, or the end
            middle = (low + high) // 2
            start = self._data.rfind(b"\n", low, middle) + 1 or low
            end = self._data.find(b"\n", start)
            if self._step(start, end) > step:
                high = start
            else:
                low = end + 1
        return low

    def _step(self, start: int, end: int) -> int:
        try:
            step = json.loads(self._data[start:end])["step"]
        except (ValueError, KeyError, TypeError):
            step = None
        if not isinstance(step, int):
            raise UserError(f"{self._path}, at byte {start}: not a JSON object with a step")
        return step


def _cut(path: Path, after: int) -> None:
    """Remove the lines of steps later than ``after``, and a half-written last line."""
    with naming(path):
        length = _Lines(path).after(after)
        if length < path.stat().st_size:
            with path.open("r+b") as handle:
                handle.truncate(length)


def _files(folder: Path) -> dict[int, Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return {int(match[1]): path for path in found if (match := _NAME.fullmatch(path.name))}
