"""Data of the report: the run directory, reduced to a size that a browser opens quickly."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.config.yaml_text import parse_yaml
from megarl.errors import UserError
from megarl.jobs import job_with_sections
from megarl.metrics.report_series import Best, add_training_rate, best_step, x_axes
from megarl.metrics.summary import as_number, merge_steps, summarize
from megarl.metrics.timeline import read_timeline
from megarl.run_directory import read_metrics, read_steps, to_json

MAX_CHART_STEPS = 2000
"""Steps drawn; a longer run shows evenly spaced steps, the worst of each interval and all evaluations."""
MAX_SAMPLE_BYTES = 4 * 2**20
"""Maximum size of the samples embedded as JSON."""
MAX_ANSWER_BYTES = 2 * 2**20
"""Maximum size of the evaluations' answers embedded as JSON."""
MAX_TIMELINE_BYTES = 2**20
"""Maximum size of the ranks' timelines embedded as JSON."""
TOKEN_FIELDS = ("rollout_logprobs", "trainer_logprobs", "entropy", "token_advantages", "response_tokens")
"""Fields of a sample with one value per response token."""
_MAX_SAMPLE_STEPS = 64
_MAX_TIMELINE_STEPS = 64
_SLOWEST_STEPS = 8  # of which a timeline is wanted first

_SAMPLES_NAME = re.compile(r"step_(\d+)\.jsonl")


@dataclass(frozen=True, slots=True)
class SampleSelection:
    """Samples on the page, and the totals."""

    records: list[str]  # each one JSON object
    num_in_steps: int  # samples in the files of the shown steps
    num_steps_shown: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class RunData:
    """Data of a run for the report."""

    name: str
    kind: str  # the job: grpo, dpo, ...; run where its configuration is missing
    is_online: bool  # whether it trains on its own samples
    steps: list[dict[str, Any]]  # merged metrics lines, ascending
    chart_steps: list[dict[str, Any]]  # those that are drawn
    config: dict[str, Any]
    config_text: str
    summary: dict[str, Any]  # summary.json over what the metrics say
    finished: bool  # summary.json is there and covers the last step
    samples: SampleSelection
    answers: SampleSelection  # of evaluations
    axes: dict[str, list[float]]  # of chart_steps: samples, tokens, hours
    best: Best | None
    rewards: list[dict[str, Any]]  # rewards.jsonl, of the drawn steps
    timeline: dict[int, dict[int, dict[str, Any]]]  # step -> rank -> its line, of chosen steps
    starts: list[dict[str, Any]]  # provenance.jsonl
    inputs: dict[str, Any]  # inputs.json


def read_run(run_dir: Path) -> RunData:
    """Read a run directory; missing files are not shown.

    Raises:
        UserError: the directory does not exist, or a file in it is invalid.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    steps = merge_steps(read_metrics(run_dir))
    config_path, summary_path = run_dir / "config.yaml", run_dir / "summary.json"
    config_text = config_path.read_text(encoding="utf-8") if config_path.exists() else ""
    config = parse_yaml(config_text, str(config_path)).value or {}
    written = _read_json(summary_path) if summary_path.exists() else {}
    summary = summarize(steps) | {name: value for name, value in written.items() if value is not None}
    is_online = "rollout" in config or any("reward_mean" in step for step in steps)
    planned = config.get("training", {}).get("num_steps") or 0
    starts = _read_lines(run_dir / "provenance.jsonl")
    add_training_rate(steps, starts[-1] if starts else None)
    axes = x_axes(steps, _samples_per_step(config))
    chosen = _thin(steps)
    return RunData(
        name=str(config.get("run", {}).get("dir") or run_dir.resolve().name).removeprefix("runs/"),
        kind=job_with_sections(config).name if config else "run",
        is_online=is_online,
        steps=steps,
        chart_steps=[steps[i] for i in chosen],
        config=config,
        config_text=config_text,
        summary=summary,
        # summary.json may be from an earlier, shorter run that has been continued
        finished=bool(written) and bool(steps) and steps[-1]["step"] >= planned,
        samples=_select_samples(run_dir / "samples", MAX_SAMPLE_BYTES),
        answers=_select_samples(run_dir / "evaluations", MAX_ANSWER_BYTES),
        axes={name: [values[i] for i in chosen] for name, values in axes.items()},
        best=best_step(steps),
        rewards=_rewards(run_dir, {steps[i]["step"] for i in chosen}),
        timeline=read_timeline(run_dir, _timeline_steps(steps), MAX_TIMELINE_BYTES),
        starts=starts,
        inputs=_read_json(path) if (path := run_dir / "inputs.json").exists() else {},
    )


def _rewards(run_dir: Path, drawn: set[int]) -> list[dict[str, Any]]:
    return [line for line in read_steps(run_dir / "rewards.jsonl") if line["step"] in drawn]


def _samples_per_step(config: Mapping[str, Any]) -> int | None:
    """Return the samples or examples of a step, None if the configuration does not say."""
    rollout = config.get("rollout") or {}
    if "num_prompts_per_step" in rollout:
        return int(rollout["num_prompts_per_step"]) * int(rollout.get("num_generations_per_prompt", 1))
    size = config.get("training", {}).get("batch_size")
    return None if size is None else int(size)


def chart_columns(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return metric -> one value per step, None if missing; numbers exactly as written."""
    names = dict.fromkeys(name for step in steps for name in step if name != "step")
    return {name: [step.get(name) for step in steps] for name in names}


def _thin(steps: list[dict[str, Any]]) -> list[int]:
    """Return the indices of the steps that are drawn."""
    if len(steps) <= MAX_CHART_STEPS:
        return list(range(len(steps)))
    stride = -(-len(steps) // (MAX_CHART_STEPS // 2))
    kept = {0, len(steps) - 1}
    kept |= {i for i, step in enumerate(steps) if "accuracy" in step or "validation_loss" in step}
    for start in range(0, len(steps), stride):
        stretch = range(start, min(start + stride, len(steps)))
        # thinning must keep spikes
        kept |= {start, max(stretch, key=lambda i: _severity(steps[i]))}
    return sorted(kept)


def _timeline_steps(steps: list[dict[str, Any]]) -> list[int]:
    """Order the steps whose timeline to show: the last, the slowest, then evenly spaced ones."""
    timed = [step["step"] for step in steps if step.get("seconds") is not None]
    seconds = {step["step"]: as_number(step.get("seconds")) or 0.0 for step in steps}
    slowest = sorted(timed, key=lambda step: seconds[step], reverse=True)[:_SLOWEST_STEPS]
    return list(dict.fromkeys([*timed[-1:], *slowest, *_coarse_to_fine(timed)]))[:_MAX_TIMELINE_STEPS]


def _severity(step: Mapping[str, Any]) -> float:
    value = step.get("logprob_abs_diff_max", step.get("grad_norm", 0.0))
    return float("inf") if isinstance(value, str) else float(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line; [] if there is none."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"{path}, line {number}: not valid JSON") from None
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        found.append(value)
    return found


def _select_samples(folder: Path, max_bytes: int) -> SampleSelection:
    """Select samples of the last and first step, then of finer subdivisions, until the size limit."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _SAMPLES_NAME.fullmatch(path.name):
            found[int(match[1])] = path
    steps = sorted(found)
    chosen: dict[int, list[str]] = {}
    num_in_steps, room = 0, max_bytes
    for step in _coarse_to_fine(steps)[:_MAX_SAMPLE_STEPS]:
        lines = [line for line in found[step].read_text(encoding="utf-8").split("\n") if line]
        step_room = min(room, max_bytes // 4)  # one step of huge samples must not take the page
        records = []
        for number, line in enumerate(lines, start=1):
            record = _fit(line, step_room, f"{found[step]}, line {number}")
            if record is None:
                break
            size = len(record.encode(errors="backslashreplace"))
            step_room, room = step_room - size, room - size
            records.append(record)
        if not records:
            break
        num_in_steps += len(lines)
        chosen[step] = records
    return SampleSelection(
        records=[record for step in sorted(chosen) for record in chosen[step]],
        num_in_steps=num_in_steps,
        num_steps_shown=len(chosen),
        num_steps=len(steps),
    )


def _fit(line: str, room: int, where: str) -> str | None:
    """Return a sample as JSON, without token logprobs if only that fits; None if it does not fit."""
    try:
        sample = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON") from error
    if not isinstance(sample, dict):
        raise UserError(f"{where}: not a JSON object")
    if len(record := _embed(sample)) <= room:
        return record
    for name in TOKEN_FIELDS:
        sample.pop(name, None)
    sample["logprobs_left_out"] = True
    record = _embed(sample)
    return record if len(record) <= room else None


def _embed(sample: dict[str, Any]) -> str:
    return to_json(sample, separators=(",", ":"))


def _coarse_to_fine(steps: list[int]) -> list[int]:
    """Order the steps: the last, the first, then midpoints of ever smaller intervals."""
    if len(steps) <= 2:
        return steps[::-1]
    order = [len(steps) - 1, 0]
    spans = [(0, len(steps) - 1)]
    for low, high in spans:  # extended during iteration: breadth first
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            spans += [(low, middle), (middle, high)]
    return [steps[i] for i in order]
