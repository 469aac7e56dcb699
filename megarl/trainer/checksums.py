"""Checksums of a checkpoint's files, to detect files that changed after they were written.

``checksums.json`` of a checkpoint has every other file's size and the CRC-32 of each 64 MiB of it. A rank
sums what it has written in the writing thread; the first rank adds the small files and those a backend left
out. Two bytes that a disk or a copy has flipped are found before anything is loaded.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHECKSUMS_FILE = "checksums.json"
_BLOCK = 64 * 2**20
_PIECE = 2**20  # bytes in memory per thread
_THREADS = 4  # 1.3 GB/s each as measured; CRC-32 releases the interpreter lock

Checksum = dict[str, Any]
"""Of one file: its ``size`` in bytes, and ``crc32``, a list of numbers."""


def checksums_of(folder: Path, names: Iterable[str]) -> dict[str, Checksum]:
    """Return the checksums of these files of ``folder``, by name; OSError if one cannot be read."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    blocks = [(name, start) for name, size in sizes.items() for start in range(0, size, _BLOCK)]
    found: dict[str, Checksum] = {name: {"size": size, "crc32": []} for name, size in sizes.items()}
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = threads.map(lambda block: _sum_block(folder / block[0], block[1]), blocks)
        for (name, _), value in zip(blocks, sums, strict=True):
            found[name]["crc32"].append(value)
    return found


def _sum_block(path: Path, start: int) -> int:
    value, left = 0, _BLOCK
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left > 0 and (piece := file.read(min(_PIECE, left))):
            value, left = zlib.crc32(piece, value), left - len(piece)
    return value


def write_checksums(folder: Path, found: dict[str, Checksum]) -> None:
    """Write the checksums next to the files."""
    (folder / CHECKSUMS_FILE).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def seal(folder: Path) -> None:
    """Complete the checksums of all files in ``folder``: merge those written, compute the missing ones."""
    found: dict[str, Checksum] = {}
    for file in sorted(folder.rglob(CHECKSUMS_FILE)):
        prefix = file.parent.relative_to(folder)
        found |= {str(prefix / name): each for name, each in json.loads(file.read_text()).items()}
        file.unlink()
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    write_checksums(folder, found | checksums_of(folder, sorted(names - found.keys())))


def is_sealed(folder: Path) -> bool:
    """Return True if there are checksums: older checkpoints have none."""
    return (folder / CHECKSUMS_FILE).is_file()


def damage(folder: Path, share: int = 0, of: int = 1) -> list[str]:
    """Return a phrase per damaged file of a checkpoint; none if it is intact or has no checksums.

    ``of`` ranks divide the files between them; this is number ``share``.
    """
    if not folder.is_dir():
        return ["it is no directory"] if share == 0 else []
    if not is_sealed(folder):
        return []
    try:
        expected = json.loads((folder / CHECKSUMS_FILE).read_text())
        sizes = {name: int(each["size"]) for name, each in expected.items()}
        sums = {name: [int(value) for value in each["crc32"]] for name, each in expected.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return [f"{CHECKSUMS_FILE} cannot be read"] if share == 0 else []
    found = []
    for name in sorted(sizes)[share::of]:
        try:
            found += _damage_of(folder, name, sizes[name], sums[name])
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def _damage_of(folder: Path, name: str, size: int, sums: list[int]) -> list[str]:
    path = folder / name
    if not path.is_file():
        return [f"{name} is missing"]
    if (now := os.stat(path).st_size) != size:
        return [f"{name} has {now} bytes, not {size}"]
    actual = checksums_of(folder, [name])[name]["crc32"]
    bad = [i for i, (a, b) in enumerate(zip(actual, sums, strict=True)) if a != b]
    return [f"{name} has changed since it was written (in bytes {bad[0] * _BLOCK} and after)"] if bad else []
