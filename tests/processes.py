"""Query other processes, which may end, or have ended, meanwhile."""

from __future__ import annotations

import re

import psutil


def command_line(process: psutil.Process) -> str:
    """The words of its command line, joined; empty for a process that has ended (a zombie has none)."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def apart_from_waits(errors: str) -> list[str]:
    """Lines of standard error without those that a slow machine adds: "reading data ... 3 s"."""
    return [line for line in errors.splitlines() if not re.fullmatch(r".+ \.\.\.( \d+ s)?", line)]
