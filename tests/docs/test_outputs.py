"""Outputs that pages print are, in kind, what their commands say; `make guides` compares the long ones."""

from __future__ import annotations

import contextlib
import shlex

import pytest

from megarl.cli import main
from tools.doc_outputs import Output, difference, in_kind, outputs
from tools.run_guides import named_outputs

INSTANT = ("config", "plan", "recipes", "help", "completion", "--help", "--version")
"""Commands that are run here, in process."""
NAMED = [(page, command, text) for page, command, text in named_outputs()]
PAGE = """
```bash
megarl sft x.yaml
```

```text
step 1
```

Words.

```text
no output
```

<!-- output: megarl config optimizer.lr -->
```text
optimizer.lr
```
"""


def test_which_blocks_are_outputs() -> None:
    assert list(outputs(PAGE)) == [
        Output("megarl sft x.yaml\n", "step 1\n", follows=True),
        Output("megarl config optimizer.lr", "optimizer.lr\n", follows=False),
    ]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("step 12:  loss 0.58 lr 4e-3 13,012 tok/s eta 1:12", "step #: loss # lr # # tok/s eta #"),
        ("Report: /tmp/x/report.html after 3.1 s", "Report: PATH after # s"),
        ("runs/a: 853k parameters, 97.5% in step_40", "PATH: # parameters, # in step_#"),
        ("torch 2.13.0", "torch #"),
    ],
)
def test_what_may_differ(line: str, kind: str) -> None:
    assert in_kind(line) == kind


@pytest.mark.parametrize(
    ("printed", "real", "same"),
    [
        ("a 1\nb\n", "a 2\nb\n", True),
        ("a\nb\n", "a\n\nb\n", True),
        ("a\nb\n", "a\nc\n", False),
        ("a\n", "a\nb\n", False),
        ("a\nb\n", "a\n", False),
        ("b\n", "a\nb\n", False),
        ("...\nb\n", "a\nb\n", True),
        ("...\nb\n", "b\nb\n", True),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nb\nc\n", False),
        ("a\n...\n", "a\n", True),
        ("a of ...\n", "a of 3 things\n", True),
        ("a of ...\n", "b of 3 things\n", False),
        ("loss 1\n", "losses 1\n", False),
        ("a\nb\n", "a\nreading data ...\nreading data ... 31 s\nb\n", True),
    ],
)
def test_comparison(printed: str, real: str, same: bool) -> None:
    assert (difference(printed, real) is None) == same


def is_instant(command: str) -> bool:
    return shlex.split(command)[1] in INSTANT


def test_some_are_instant() -> None:
    assert sum(is_instant(command) for _, command, _ in NAMED) >= 3


@pytest.mark.parametrize(("page", "command", "text"), [each for each in NAMED if is_instant(each[1])])
def test_instant_commands(page: str, command: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(shlex.split(command)[1:])
    said = capsys.readouterr()
    assert difference(text, said.out + said.err) is None, difference(text, said.out + said.err)
