"""Formats of rows by their columns, and what trains on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megarl.config.section import Problems, Section, rule


@dataclass(frozen=True, slots=True)
class RowFormat:
    """A format of rows.

    ``needs`` are the columns of every row, ``may`` others that are read; ``users`` says which job takes the
    rows, for errors.
    """

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    users: str

    @property
    def columns(self) -> str:
        """The columns in words."""
        return ", ".join([*map(repr, self.needs), *(f"{name!r} (optional)" for name in self.may)])


_SFT = "megarl sft trains on them"
_PAIRS = "megarl dpo and megarl rm train on them"
_PROMPTS = "megarl grpo, ppo, distill and eval take prompts"

FORMATS = {
    each.name: each
    for each in (
        RowFormat(
            "stepwise_supervision",
            ("prompt", "completions", "labels"),
            (),
            "they train process reward models, for which there is no job",
        ),
        RowFormat("preference", ("chosen", "rejected"), ("prompt",), _PAIRS),
        RowFormat("unpaired_preference", ("prompt", "completion", "label"), (), _PAIRS),
        RowFormat("prompt_completion", ("prompt", "completion"), ("tools",), _SFT),
        RowFormat("prompt_response", ("prompt", "response"), (), _SFT),
        RowFormat("messages", ("messages",), ("tools",), _SFT),
        RowFormat("sharegpt", ("conversations",), ("system", "tools"), _SFT),
        RowFormat("alpaca", ("instruction", "output"), ("input", "system", "history"), _SFT),
        RowFormat("text", ("text",), (), _SFT),
        RowFormat("prompt", ("prompt",), ("answer",), _PROMPTS),
    )
}
"""Name -> format; a row with the columns of several is of the first (:mod:`megarl.data.row_formats`)."""

Name = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "text",
    "prompt",
    "prompt_response",
    "prompt_completion",
    "preference",
    "unpaired_preference",
    "stepwise_supervision",
]


class RowColumns(Section):
    """Format of the rows; subclasses name their columns."""

    row_format: Name = "auto"
    """Format of the rows (docs/guides/data.md); auto: recognised by the columns of each row."""

    usable: ClassVar[tuple[str, ...]] = ()
    """Formats that the jobs of this source train on."""

    @rule
    def _usable(self) -> Problems:
        """row_format is one that the job trains on (docs/guides/data.md)."""
        if self.row_format != "auto" and self.row_format not in self.usable:
            given = FORMATS[self.row_format]
            use = ", ".join(self.usable)
            yield "row_format", f"not for this job: {given.users}; here: {use} (got {self.row_format!r})"
