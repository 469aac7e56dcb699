"""Files that downloads, editors and full disks damage: what is wrong with one is a line that names it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.errors import UserError

# What the machine or a path is to blame for, never the code that met it.
_OUTSIDE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}
_ADVICE = {
    errno.ENOSPC: "make room and start the same command again",
    errno.EDQUOT: "make room and start the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine's limit of open files is reached",
}
_ROOM = 2**20  # bytes: with fewer than these left, a failed write has met a full disk


def as_user_error(error: BaseException) -> UserError | None:
    """The line for an error that the machine is to blame for (a full disk, a name too long); else None."""
    if isinstance(error, UserError):
        return error
    if not isinstance(error, OSError) or error.errno not in _OUTSIDE:
        return None
    names = " to ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None)
    advice = f"; {_ADVICE[error.errno]}" if error.errno in _ADVICE else ""
    return UserError(f"{names or 'a file'}: {os.strerror(error.errno)}{advice}")


def read_json_object(path: Path, field: str = "") -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.
        field: configuration key to begin the error with.

    Raises:
        UserError: it cannot be read, is no UTF-8, no JSON, nested too deeply, or no object.
    """
    at = f"{field}: {path}" if field else str(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{at}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{at}: {stand_in(path) or f'not UTF-8 text ({error.reason})'}") from None
    except json.JSONDecodeError as error:
        what = stand_in(path) or f"not valid JSON: {error.msg}"
        raise UserError(f"{at}:{error.lineno}: {what}") from None
    except RecursionError:
        raise UserError(f"{at}: its values are nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{at}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{at}: expected a JSON object, found {type(value).__name__}")
    return value


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file, of a safetensors index; the files lie in its directory.

    Raises:
        UserError: it is damaged, or names a file outside.
    """
    shards = read_json_object(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{path}: no weight_map that says which file has which tensor")
    for name, file in shards.items():
        if not isinstance(file, str) or not file or "\0" in file:
            raise UserError(f"{path}: weight_map gives tensor {name} no file's name (got {file!r})")
        if file.startswith("/") or ".." in Path(file).parts:
            raise UserError(f"{path}: weight_map sends tensor {name} out of the directory (to {file!r})")
    return shards


def stand_in(path: Path) -> str | None:
    """Return what a file is that stands in for one not downloaded; None if it may be the file."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return None
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself (git lfs pull)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, not the file itself"
    return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Around a write to an open file: an error that names none, as a full disk's, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around code that writes below ``path``, an existing directory.

    Raises:
        UserError: the disk is full, in whatever words the library that wrote has said so.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch's and safetensors' writers raise types of their own
        if (found := disk_is_full(path, error)) is not None:
            raise found from error
        raise


def disk_is_full(path: Path, error: BaseException) -> UserError | None:
    """The line for a failed write below ``path`` where that file system has no room left; else None.

    Writers of libraries say it in ways of their own: "unexpected pos 704 vs 598", "I/O error".
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOSPC, errno.EDQUOT):
        return None
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    no_room = status.f_bavail * status.f_frsize < _ROOM or (status.f_files > 0 and status.f_favail == 0)
    if no_room or "No space left" in str(error):
        return as_user_error(OSError(errno.ENOSPC, "", str(path)))
    return None
