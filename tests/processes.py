"""Query other processes, which may end, or have ended, meanwhile."""

from __future__ import annotations

import psutil


def command_line(process: psutil.Process) -> str:
    """The words of its command line, joined; empty for a process that has ended (a zombie has none)."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
