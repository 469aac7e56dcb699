"""`megarl data inspect`: show a run's examples as the run will see them, and what became of the rows."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from megarl.config.infer import load_inferred
from megarl.data.order import order_of
from megarl.data.stream import beginning
from megarl.errors import UserError
from megarl.jobs import JOBS
from megarl.loops.model_files import read_model
from megarl.records import Pair, Prompt, TokenSequence
from megarl.terminal import printable, working

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NUM_MEASURED = 1000
_LEARNED = "bold green"


def run(options: argparse.Namespace) -> int:
    """Show the examples selected by ``options``; return the exit code."""
    if options.n < 0:
        raise UserError(f"-n: expected a whole number >= 0 (got {options.n})")
    with working("reading model and data"):
        jobs, config = load_inferred(
            options.config, options.overrides, list(JOBS.values()), options.job, check_weights=False
        )
        _, tokenizer, longest = read_model(config)
        split = options.split
        if getattr(config.data, split) is None:
            raise UserError(f"data.{split}: missing, nothing to show")
        data = jobs[0].data.loader()(config, tokenizer, longest, split)
    console = Console(highlight=False, soft_wrap=True)
    shuffle = split == "train" and bool(getattr(config.data, "shuffle", False))
    shown, streamed = beginning(data), ""
    if data.stream is not None:
        streamed = f" in the first {getattr(config.data, split).streaming_window:,} rows of a stream"
    indices = order_of(data, shuffle, config.run.seed).batch(0, min(options.n, len(shown)))
    names = " or ".join(job.name for job in jobs)
    count = f"{len(shown)} {jobs[0].data.noun}{streamed}"
    console.print(f"megarl {names}, data.{split}: {count}; {_legend(console)}")
    for index in indices:
        for title, sequence, note in _views(data[index], index):
            lengths = f"{len(sequence)} tokens, {int(sequence.loss_mask.sum())} learned"
            console.rule(Text(f"{title}: {lengths}"), align="left", characters="-")
            console.print(rendered(tokenizer, sequence, colour=console.color_system is not None))
            if note:
                console.print(Text(note, style="dim"))
    console.rule(f"all of {'the first window' if streamed else 'them'}", align="left", characters="-")
    for line in _summary(shown, longest):
        console.print(Text(printable(line)))
    return 0


def _legend(console: Console) -> Text | str:
    if console.color_system is None:
        return "tokens with a loss are between [[ and ]]"
    return Text.assemble("what is learned is ", ("green", _LEARNED))


def _views(example: TokenSequence | Pair | Prompt, index: int) -> Iterator[tuple[str, TokenSequence, str]]:
    """Yield title, sequence and a note for each sequence of an example."""
    match example:
        case Pair():
            yield f"pair {index}, chosen", example.chosen, ""
            yield f"pair {index}, rejected", example.rejected, ""
        case Prompt():
            source = example.metadata.get("source")
            title = f"problem {index}" + (f" ({source})" if source else "")
            sequence = TokenSequence(example.token_ids, np.zeros(len(example.token_ids)))
            yield printable(title), sequence, f"reference answer: {example.metadata.get('answer')!r}"
        case TokenSequence():
            yield f"sequence {index}", example, ""


def rendered(tokenizer: PreTrainedTokenizerBase, sequence: TokenSequence, *, colour: bool) -> Text:
    """Return the tokens as text, those with a loss in green, or between [[ and ]] without colour."""
    text, position = Text(), 0
    for learned, run_ in groupby(sequence.loss_mask.tolist()):
        length = len(list(run_))
        ids = sequence.token_ids[position : position + length]
        part = printable(tokenizer.decode(ids, skip_special_tokens=False))
        position += length
        if not learned:
            text.append(part, style="dim" if colour else "")
        elif colour:
            text.append(part, style=_LEARNED)
        else:
            text.append(f"[[{part}]]")
    return text


def _summary(data: Any, longest: int) -> Iterator[str]:
    count = min(len(data), _NUM_MEASURED)
    sequences = [s for i in range(count) for _, s, _ in _views(data[i], i)]
    lengths = [len(s) for s in sequences]
    which = "" if count == len(data) else f" (of the first {count})"
    yield (
        f"tokens{which}: {min(lengths)} to {max(lengths)}, median {statistics.median(lengths):g}; the run's "
        f"longest sequence is {longest}"
    )
    if learned := sum(int(s.loss_mask.sum()) for s in sequences):
        yield f"learned{which}: {learned} of {sum(lengths)} tokens, {learned / sum(lengths):.0%}"
    lines = [line for report in data.reports for line in report.lines()]
    yield from lines or ["dropped: none; bad rows: none"]
