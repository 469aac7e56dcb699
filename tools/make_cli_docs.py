"""Write docs/cli.md from the command line's help. A test fails if the page differs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from unittest import mock

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
INTRODUCTION = """\
# Command line

Written by `python tools/make_cli_docs.py` from `megarl COMMAND --help`.

Exit codes: 0 done; 1 a bug, with its traceback; 2 something in the input, one line each; 130, 143 and 129
after SIGINT, SIGTERM and SIGHUP, with a checkpoint written first.

Settings (`key=value`) may stand anywhere behind the command, also as `--key=value` or `--key value`. A YAML
file may be given by `-c`, `--config`, or alone. Without a file all settings come from the command line.

Environment variables that MegaRL reads: `MEGARL_PLATFORM` (`cpu` or `cuda` in place of what is found),
`MEGARL_CUDA=1` (which environment `make setup` makes), `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR`,
`MASTER_PORT` and Slurm's (set by launchers), and `${NAME}` wherever a configuration says so.
"""


def text_of(parser: argparse.ArgumentParser) -> str:
    """Return a parser's help, the same on every terminal."""
    with mock.patch.dict(os.environ, COLUMNS="110", NO_COLOR="1"):
        return parser.format_help().rstrip()


def page() -> str:
    """Return the whole page."""
    from megarl.cli import make_parsers

    parser, commands, _ = make_parsers()
    parts = [INTRODUCTION, "## megarl\n", f"```text\n{text_of(parser)}\n```\n"]
    for name, command in commands.items():
        parts += [f"## megarl {name}\n", f"```text\n{text_of(command)}\n```\n"]
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner, sub in action.choices.items():
                    parts += [f"### megarl {name} {inner}\n", f"```text\n{text_of(sub)}\n```\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
