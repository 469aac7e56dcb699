"""`megarl compare`: configuration, final metrics and paired differences of runs.

Differences are those of each run to the first one. Over steps: of both runs' values of the same step. As
neighbouring steps are not independent, the interval is a bootstrap of blocks of steps (Künsch 1989). Over
problems: of the shares of correct answers to the same problem, with a bootstrap of problems.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from megarl.config.yaml_text import parse_yaml
from megarl.errors import UserError
from megarl.jobs import job_with_sections
from megarl.metrics.passk import CONFIDENCE, bootstrap_interval
from megarl.metrics.summary import as_number, merge_steps
from megarl.run_directory import RunDirectory, flatten, read_metrics
from megarl.terminal import one_line

METRICS = (
    *("accuracy", "reward_mean", "loss", "validation_loss", "validation_accuracy", "reward_accuracy"),
    *("kl_ref", "entropy", "grad_norm", "logprob_abs_diff_max", "response_length_mean", "seconds"),
)
"""Metrics shown without --metric, where a run has them."""
_NOT_COMPARED = ("run.dir",)
_DRAWS = 2000
_LEAST_BLOCKS = 5  # fewer give no interval

Problem = tuple[str, str, int]
"""Prompt, reference answer, and the how manieth with both (a data set may repeat itself)."""


@dataclass(frozen=True, slots=True)
class Run:
    """Parts of a run directory that are compared."""

    directory: str
    job: str
    config: dict[str, Any]  # dotted key -> value
    steps: list[dict[str, Any]]  # merged lines of metrics.jsonl, ascending
    evaluations: dict[int, Path]  # step -> file

    def series(self, metric: str) -> dict[int, float]:
        """Return step -> value of a metric, where it is finite."""
        found = {line["step"]: as_number(line.get(metric)) for line in self.steps}
        return {step: value for step, value in found.items() if value is not None and math.isfinite(value)}


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of (this run - the first run) over ``count`` pairs; no interval where they are too few."""

    mean: float
    interval: tuple[float, float] | None
    count: int
    better: int | None = None  # of problems: how many of them this run answers better
    worse: int | None = None


def run(options: argparse.Namespace) -> int:
    """Compare the runs and print."""
    if len(options.runs) < 2:
        raise UserError(
            f"megarl compare: at least two run directories are compared (got {len(options.runs)})"
        )
    found = compare([read(path) for path in options.runs], options.metric)
    print(json.dumps(found, indent=1) if options.json else as_text(found))
    return 0


def read(path: Path) -> Run:
    """Read a run directory.

    Raises:
        UserError: it is none, or has no metrics and no answers.
    """
    directory = RunDirectory(path)
    if not directory.config_path.is_file():
        raise UserError(f"{path}: not a run directory (no config.yaml in it)")
    text = directory.config_path.read_text(encoding="utf-8")
    config = parse_yaml(text, str(directory.config_path), expand=False).value
    if not isinstance(config, dict):
        raise UserError(f"{directory.config_path}: not a configuration")
    job = job_with_sections(config)
    # megarl eval keeps its answers where a run keeps its samples.
    folder = directory.evaluations_path if job.trains else directory.samples_path
    evaluations = {
        int(file.stem[5:]): file for file in folder.glob("step_*.jsonl") if file.stem[5:].isdigit()
    }
    steps = merge_steps(read_metrics(path))
    if not steps and not evaluations:
        raise UserError(f"{path}: nothing to compare yet (no metrics.jsonl, no answers)")
    return Run(str(path), job.name, flatten(config), steps, evaluations)


def compare(runs: Sequence[Run], metrics: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the comparison as plain data.

    ``metrics`` are shown and compared step by step; None: METRICS.

    Raises:
        UserError: no run has one of ``metrics``.
    """
    known = {name for run in runs for line in run.steps for name in line} - {"step"}
    if missing := [name for name in metrics or () if name not in known]:
        raise UserError(f"--metric: no run has {', '.join(missing)}; there are {', '.join(sorted(known))}")
    names = metrics or [name for name in METRICS if name in known]
    first, *others = runs
    return {
        "runs": [
            {
                "directory": each.directory,
                "job": each.job,
                "last_step": each.steps[-1]["step"] if each.steps else None,
            }
            for each in runs
        ],
        "configuration": _configuration(runs),
        "final": {name: [_final(each, name) for each in runs] for name in names},
        "paired": [
            {
                "run": other.directory,
                "first": first.directory,
                "steps": {
                    name: asdict(found)
                    for name in names
                    if (found := over_steps(first.series(name), other.series(name))) is not None
                },
                "problems": _problems(first, other),
            }
            for other in others
        ],
    }


def _configuration(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return dotted key -> each run's value, None where it has none, of the keys that differ."""
    keys = dict.fromkeys(key for each in runs for key in each.config if key not in _NOT_COMPARED)
    rows = {key: [each.config.get(key) for each in runs] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _final(run: Run, metric: str) -> dict[str, Any] | None:
    """Return the last value and its step."""
    series = run.series(metric)
    return {"step": max(series), "value": series[max(series)]} if series else None


def over_steps(first: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Return the mean difference over common steps; None without any."""
    common = sorted(first.keys() & other.keys())
    if not common:
        return None
    values = numpy.array([other[step] - first[step] for step in common])
    return Difference(float(values.mean()), block_interval(values), len(values))


def block_interval(values: numpy.ndarray, seed: int = 1) -> tuple[float, float] | None:
    """Return the percentile interval of the mean of a series [n] by resampling blocks of about sqrt(n) steps.

    Blocks may begin anywhere and wrap around, so every step is drawn equally often (Politis and Romano 1992).
    None for fewer than 5 blocks.
    """
    length = max(1, round(math.sqrt(len(values))))
    blocks = len(values) // length
    if blocks < _LEAST_BLOCKS:
        return None
    draw = numpy.random.default_rng(seed)
    starts = draw.integers(0, len(values), (_DRAWS, blocks, 1))
    means = values[(starts + numpy.arange(length)) % len(values)].mean(axis=(1, 2))
    low, high = numpy.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


# --- problems ------------------------------------------------------------------------------------


def _problems(first: Run, other: Run) -> dict[str, Any] | None:
    """Compare the answers of the last evaluation that both have; of two evaluations, their only ones."""
    common = first.evaluations.keys() & other.evaluations.keys()
    if not common:
        return None
    step = max(common)
    ours, theirs = (problem_scores(each.evaluations[step]) for each in (first, other))
    found = over_problems(ours, theirs)
    if found is None:
        return None
    alone = [len(scores.keys() - both.keys()) for scores, both in ((ours, theirs), (theirs, ours))]
    means = [
        float(numpy.mean([scores[each] for each in ours.keys() & theirs.keys()])) for scores in (ours, theirs)
    ]
    return asdict(found) | {"step": step, "accuracy": means, "only_in_one": alone}


def problem_scores(path: Path) -> dict[Problem, float]:
    """Return the share of correct answers to each problem of an evaluation.

    Raises:
        UserError: a line is no answer.
    """
    shares: dict[tuple[str, str, Any], list[bool]] = defaultdict(list)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                shares[row["prompt"], str(row["answer"]), row["prompt_index"]].append(bool(row["correct"]))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}, line {number}: not an answer of an evaluation") from None
    repeated: Counter[tuple[str, str]] = Counter()
    scores: dict[Problem, float] = {}
    for (prompt, answer, _), correct in shares.items():
        scores[prompt, answer, repeated[prompt, answer]] = sum(correct) / len(correct)
        repeated[prompt, answer] += 1
    return scores


def over_problems(first: Mapping[Problem, float], other: Mapping[Problem, float]) -> Difference | None:
    """Return the mean difference over common problems; None without any."""
    values = [other[each] - share for each, share in first.items() if each in other]
    if not values:
        return None
    interval = bootstrap_interval(values) if len(values) >= _LEAST_BLOCKS else None
    return Difference(
        sum(values) / len(values),
        interval,
        len(values),
        better=sum(value > 0 for value in values),
        worse=sum(value < 0 for value in values),
    )


# --- text ----------------------------------------------------------------------------------------


def as_text(found: Mapping[str, Any]) -> str:
    """Return the comparison as tables."""
    names = _short([each["directory"] for each in found["runs"]])
    lines = [
        f"{name}: megarl {each['job']}, {each['directory']}, "
        + ("no steps" if each["last_step"] is None else f"last step {each['last_step']}")
        for name, each in zip(names, found["runs"], strict=True)
    ]
    rows = [[key, *(_value(each) for each in row)] for key, row in found["configuration"].items()]
    lines += ["", "configuration", *(_table(["", *names], rows) if rows else ["  the same"])]
    rows = [
        [metric, *("-" if each is None else f"{each['value']:.4g} @ {each['step']}" for each in row)]
        for metric, row in found["final"].items()
    ]
    lines += ["", "last value @ step", *(_table(["", *names], rows) if rows else ["  no steps"])]
    for name, pair in zip(names[1:], found["paired"], strict=True):
        rows = [
            [metric, f"{each['mean']:+.4g}", _interval(each["interval"]), f"{each['count']} steps"]
            for metric, each in pair["steps"].items()
        ]
        if (problems := pair["problems"]) is not None:
            rows.append(
                [
                    f"accuracy @ {problems['step']}",
                    f"{problems['mean']:+.4g}",
                    _interval(problems["interval"]),
                    f"{problems['count']} problems, {problems['better']} better, {problems['worse']} worse",
                ]
            )
        title = f"{name} - {names[0]}: mean of paired differences, {CONFIDENCE:.0%} interval"
        lines += ["", title, *(_table(None, rows) if rows else ["  no common steps or problems"])]
        if problems is not None and any(problems["only_in_one"]):
            ours, theirs = problems["only_in_one"]
            lines.append(f"  problems of one run alone, left out: {ours} of {names[0]}, {theirs} of {name}")
    return "\n".join(lines)


def _short(directories: Sequence[str]) -> list[str]:
    """Return the directories' last parts, as many as tell them apart."""
    parts = [Path(each).parts for each in directories]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(directories)


def _value(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return one_line(text if len(text) <= 40 else f"{text[:37]}...")


def _interval(interval: Sequence[float] | None) -> str:
    return "too few" if interval is None else f"[{interval[0]:+.4g}, {interval[1]:+.4g}]"


def _table(head: list[str] | None, rows: Iterable[list[str]]) -> list[str]:
    table = [*([head] if head else []), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in table
    ]
