"""The one exception meant for users."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: bad configuration, file, checkpoint or model.

    The message is one line (or one line per violation) that names the field, file or tensor. The
    command line prints it without a traceback and exits with code 2; nothing was started or lost.
    """


class ToldByRankZeroError(UserError):
    """Rank 0 met a UserError and prints it: the other ranks end with it, and without a line of their own."""
