"""Exceptions for errors that the user can fix."""

from __future__ import annotations


class UserError(Exception):
    """An error the user can fix: an invalid configuration, file, checkpoint or model.

    The message is one line (or one per violation) that names the field, file or tensor. The command line
    prints it without a traceback and exits with code 2.
    """


def see(row: str) -> str:
    """Return a reference to a row of docs/troubleshooting.md, for a message whose remedy is longer."""
    return f" (docs/troubleshooting.md#{row})"


class ToldByRankZeroError(UserError):
    """A UserError on rank 0, which prints it; the other ranks exit with this one and print nothing."""
