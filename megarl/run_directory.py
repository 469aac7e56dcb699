"""The run directory: all files of a run, and what it resumes from.

::

    runs/<name>/
      config.yaml             resolved configuration
      console.log             what the console showed, whatever became of the terminal
      inputs.json             sizes and checksums of what the run reads beside it
      provenance.jsonl        one line per start: command, commit, machine
      metrics.jsonl           one JSON object per step
      rewards.jsonl           rewards of all samples of each step, counted
      samples/step_N.jsonl    samples of step N
      evaluations/step_N.jsonl  all responses of the evaluation after step N (0: before training)
      model/                  start weights, converted from the checkpoint that model.path named
      checkpoints/step_N/     always complete: renamed into place when all files are on disk
                              (step_N.damaged: a checkpoint whose checksums failed on resume)
      summary.json            headline metrics, written at the end
      report.html             rewritten during the run
      timeline/rank_N.jsonl   when the phases of each step began and ended on rank N
      ranks/                  heartbeats of the trainer ranks, and the reason of a failure
      profile/                traces of the steps in profile.steps
      .lock                   held while a process runs here

Rank 0 opens the directory and writes; other ranks write heartbeats, their timeline and their part of a
checkpoint only.
Order of use on rank 0: ``open`` -> load ``latest_checkpoint()`` if any -> ``start_after`` ->
``append_metrics`` / ``write_samples`` / ``begin_checkpoint`` + ``commit_checkpoint`` per step -> ``close``.
A step's metrics are appended before its checkpoint is committed, so that a resumed run never lacks a line.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from megarl.config.renamed import with_new_names
from megarl.config.yaml_text import dump_yaml, parse_yaml
from megarl.errors import UserError
from megarl.files import naming

if TYPE_CHECKING:
    from megarl.config.training import TrainingRoot

# Fields that a resumed run may change: they affect logging, layout or length, not the training (up to
# rounding).
_FREE_FIELDS = (
    *("run.dir", "run.hang_timeout_seconds", "run.on_non_finite", "run.on_changed_inputs"),
    *("logging", "checkpoint", "profile", "launcher", "parallel"),
    *("training.num_steps", "training.num_epochs"),
    *("data.on_bad_row", "data.filter.too_long"),  # how to go on at a row that has not been used
    *(
        "evaluation.at_start",
        "evaluation.at_end",
        "reference.cache_dir",
        "lora.export",
        "rollout.engine.data_parallel_size",
    ),
)

_CHECKPOINT_NAME = re.compile(r"step_(\d+)")
_SAMPLES_NAME = re.compile(r"step_(\d+)\.jsonl")


class RunDirectory:
    """Paths, lock, metrics, samples and checkpoints of one run. The constructor does no I/O."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.console_path = self.path / "console.log"
        self.inputs_path = self.path / "inputs.json"
        self.provenance_path = self.path / "provenance.jsonl"
        self.metrics_path = self.path / "metrics.jsonl"
        self.rewards_path = self.path / "rewards.jsonl"
        self.samples_path = self.path / "samples"
        self.evaluations_path = self.path / "evaluations"
        self.checkpoints_path = self.path / "checkpoints"
        self.summary_path = self.path / "summary.json"
        self.report_path = self.path / "report.html"
        self.ranks_path = self.path / "ranks"
        self.timeline_path = self.path / "timeline"
        self.profile_path = self.path / "profile"
        self.tensorboard_path = self.path / "tensorboard"
        self.started_after: int | None = None
        """Step the run resumed from (None: from the beginning); set by :meth:`start_after`."""
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None

    # --- opening and closing ---------------------------------------------------------------------

    def open(self, resolved_config: Mapping[str, Any], chosen: Mapping[str, Any] | None = None) -> list[str]:
        """Take the lock, check that the configuration is compatible with the one on disk, and write it.

        Args:
            resolved_config: plain data (pydantic's ``model_dump(mode="json")``).
            chosen: the fields that are not at their default. A field that the old configuration lacks,
                because that version of MegaRL did not have it, is unchanged if at its default; with None
                it counts as changed.

        Returns:
            One line for the log per changed field.

        Raises:
            UserError: another process uses the directory; it cannot be written; or its run has a
                configuration that differs in a field that affects training.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise UserError(f"run.dir: cannot write to {self.path} ({error.strerror})") from error
        try:
            self._check_kinds()
            changes = self._compare_with_disk(resolved_config, chosen)
        except UserError:
            self.close()
            raise
        self._remove_leftovers()
        for folder in (self.samples_path, self.checkpoints_path, self.ranks_path, self.timeline_path):
            folder.mkdir(exist_ok=True)
        write_atomically(self.config_path, dump_yaml(dict(resolved_config)))
        return changes

    def _check_kinds(self) -> None:
        """Refuse files where the run keeps directories, and directories where it keeps files."""
        folders = (
            *(self.samples_path, self.checkpoints_path, self.ranks_path),
            *(self.evaluations_path, self.timeline_path),
        )
        files = (self.config_path, self.metrics_path, self.summary_path, self.report_path)
        for path in folders:
            if path.exists() and not path.is_dir():
                raise UserError(f"run.dir: {path} is a file where the run keeps a directory; move it away")
        for path in (
            *(*files, self.console_path, self.inputs_path),
            *(self.provenance_path, self.rewards_path),
        ):
            if path.is_dir():
                raise UserError(f"run.dir: {path} is a directory where the run keeps a file; move it away")

    def check_before_start(self, config: TrainingRoot) -> str | None:
        """Check the directory's files before any rank starts, without taking the lock.

        Returns:
            A line for the user if the run is complete (last checkpoint, summary and export exist), else None.

        Raises:
            UserError: the run was started with other values of fields that affect training.
        """
        if not self.config_path.exists():
            return None
        resolved = config.model_dump(mode="json")
        self._compare_with_disk(resolved, config.model_dump(mode="json", exclude_defaults=True))
        steps, saved = config.training.num_steps, self.checkpoint_steps()
        length = "training.num_steps"
        if steps is None:  # num_epochs: known of a run that has ended
            steps, length = self._steps_at_end(config.training.num_epochs), "training.num_epochs"
        exported = not config.checkpoint.export_hf or any(
            (self.path / name).is_dir() for name in ("hf", "adapter")
        )
        if steps is None or not (saved and saved[-1] >= steps and exported and self.summary_path.exists()):
            return None
        return (
            f"{self.path}: complete, {saved[-1]} of {steps} steps. Increase {length} to continue, "
            f"or set another run.dir to start afresh. Report: {self.report_path}"
        )

    def _steps_at_end(self, num_epochs: float) -> int | None:
        """Return the steps of a run of this many epochs that has written its summary; else None."""
        if not self.summary_path.exists():
            return None
        try:
            config = parse_yaml(self.config_path.read_text(encoding="utf-8"), "", expand=False).value
            summary = json.loads(self.summary_path.read_text(encoding="utf-8"))
            if config["training"]["num_epochs"] != num_epochs:
                return None
            names = ("sft_steps", "dpo_steps", "rm_steps")
            return next(int(summary[name]) for name in names if name in summary)
        except (ValueError, KeyError, TypeError, StopIteration, OSError):
            return None

    def close(self) -> None:
        """Close metrics.jsonl and release the lock. Safe to call twice."""
        for handle in (self._metrics, self._lock):
            if handle is not None:
                handle.close()
        self._metrics = self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_lock(self) -> None:
        # POSIX record locks, not flock: they belong to the process, so a forked child that outlives a
        # killed trainer does not keep the directory locked.
        lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held until close())
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise UserError(
                f"run.dir: {self.path} is in use by {holder}; wait for it to end or choose another run.dir"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock

    def _compare_with_disk(
        self, resolved_config: Mapping[str, Any], chosen: Mapping[str, Any] | None
    ) -> list[str]:
        if not self.config_path.exists():
            if self.metrics_path.exists() or self.checkpoint_steps():
                raise UserError(
                    f"run.dir: {self.path} holds metrics or checkpoints but no config.yaml, so it cannot be "
                    "resumed safely; choose another run.dir"
                )
            return []
        try:
            text = self.config_path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"{self.config_path}: cannot be read ({why}); choose another run.dir") from None
        old = parse_yaml(text, str(self.config_path), expand=False).value
        if not isinstance(old, dict):
            raise UserError(f"{self.config_path}: not a configuration; choose another run.dir")
        old = with_new_names(old)
        differing = _differences(
            old, parse_yaml(dump_yaml(dict(resolved_config)), "config.yaml", expand=False).value
        )
        if chosen is not None:
            known = flatten(old).keys() | flatten(chosen).keys()
            differing = {field: text for field, text in differing.items() if field in known}
        free = [text for field, text in differing.items() if _is_free(field)]
        binding = [text for field, text in differing.items() if not _is_free(field)]
        if binding and self.has_begun():
            raise UserError(
                f"run.dir: {self.path} was started with other values: {'; '.join(binding)}. "
                "Set a new run.dir to start afresh, or restore the old values to resume"
            )
        return free + binding

    def has_begun(self) -> bool:
        """Return whether there is a logged step or a checkpoint; before, any value may change."""
        return bool(self.checkpoint_steps()) or bool(read_metrics(self.path))

    def _remove_leftovers(self) -> None:
        """Delete the remains of an interrupted save, deletion or atomic write (the lock is held)."""
        for folder in (self.path, self.samples_path, self.evaluations_path, self.checkpoints_path):
            for pattern in (".*.tmp", ".step_*.partial", ".step_*.deleted"):
                for leftover in folder.glob(pattern):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    # --- metrics and samples ---------------------------------------------------------------------

    def start_after(self, step: int | None) -> None:
        """Delete metrics, samples and evaluations after ``step``, the last step of the loaded checkpoint.

        metrics.jsonl is replaced atomically, without later steps and without a half-written last line. None
        starts from the beginning. Call it once before the first ``append_metrics``, for a new run too.

        Raises:
            UserError: a line of metrics.jsonl, other than the last, is not a JSON object with a step.
        """
        assert self._lock is not None, "open() the run directory first"
        last = -1 if step is None else step
        kept = [line for line in read_metrics(self.path) if line["step"] <= last]
        write_atomically(self.metrics_path, "".join(_to_json_line(line) for line in kept))
        if self.rewards_path.exists():  # only runs that sample have it
            lines = [line for line in read_steps(self.rewards_path) if line["step"] <= last]
            write_atomically(self.rewards_path, "".join(_to_json_line(line) for line in lines))
        evaluations = self.evaluations_path.glob("*")  # only runs that evaluate have the folder
        for path in [*self.samples_path.iterdir(), *evaluations]:
            match = _SAMPLES_NAME.fullmatch(path.name)
            if match and int(match[1]) > last:
                path.unlink()
        self.started_after = step
        self._metrics = open(self.metrics_path, "a", encoding="utf-8")  # noqa: SIM115 (close() closes it)

    def append_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append the line ``{"step": step, **values}`` and flush it to disk.

        Lines are strict JSON: non-finite values become the strings "NaN", "Infinity", "-Infinity", which
        ``float`` accepts. Later values of the same step (an evaluation) are a second line.
        """
        assert self._metrics is not None, "call start_after() before the first step"
        with naming(self.metrics_path):
            self._metrics.write(_to_json_line({"step": step, **values}))
            self._metrics.flush()
            os.fsync(self._metrics.fileno())

    def append_rewards(self, step: int, counted: Mapping[str, Any]) -> None:
        """Append a line to rewards.jsonl; it need not survive a crash of the machine."""
        with naming(self.rewards_path), open(self.rewards_path, "a", encoding="utf-8") as handle:
            handle.write(_to_json_line({"step": step, **counted}))

    def write_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> Path:
        """Write samples/step_N.jsonl atomically.

        The report shows these keys: step, prompt_index, prompt, response, answer, reward, advantage,
        finish_reason, policy_version, num_response_tokens, info, and optionally, of each response token,
        response_tokens (text), rollout_logprobs (the engine's), trainer_logprobs, entropy (nats) and
        token_advantages (if they differ), each [N]; null where the trainer computed none.
        """
        path = self.samples_path / f"step_{step}.jsonl"
        write_atomically(path, "".join(_to_json_line(sample) for sample in samples))
        return path

    def write_evaluation(self, step: int, answers: Iterable[Mapping[str, Any]]) -> Path:
        """Write evaluations/step_N.jsonl atomically."""
        self.evaluations_path.mkdir(exist_ok=True)
        path = self.evaluations_path / f"step_{step}.jsonl"
        write_atomically(path, "".join(_to_json_line(answer) for answer in answers))
        return path

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json atomically."""
        write_atomically(self.summary_path, to_json(summary, indent=2) + "\n")

    # --- checkpoints -----------------------------------------------------------------------------

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        if not self.checkpoints_path.is_dir():
            return []
        matches = (_CHECKPOINT_NAME.fullmatch(path.name) for path in self.checkpoints_path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def checkpoint_path(self, step: int) -> Path:
        """Return the path of the complete checkpoint of a step."""
        return self.checkpoints_path / f"step_{step}"

    def partial_checkpoint_path(self, step: int) -> Path:
        """Return the path that all ranks write a checkpoint to, until rank 0 commits it."""
        return self.checkpoints_path / f".step_{step}.partial"

    def latest_checkpoint(self) -> Path | None:
        """Return the path of the newest complete checkpoint, or None. Interrupted saves are ignored."""
        steps = self.checkpoint_steps()
        return self.checkpoint_path(steps[-1]) if steps else None

    def set_aside(self, step: int) -> Path:
        """Rank 0: rename a damaged checkpoint to step_N.damaged and return its new path."""
        path = self.checkpoint_path(step)
        names = (f"{path.name}.damaged{number or ''}" for number in itertools.count())
        kept = next(each for each in map(path.with_name, names) if not each.exists())
        os.rename(path, kept)
        _fsync(self.checkpoints_path)
        return kept

    def begin_checkpoint(self, step: int) -> Path:
        """Rank 0, before the others write: create an empty ``partial_checkpoint_path(step)``."""
        assert not self.checkpoint_path(step).exists(), f"step {step} is already saved in {self.path}"
        partial = self.partial_checkpoint_path(step)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        return partial

    def commit_checkpoint(self, step: int) -> Path:
        """Rank 0, after all ranks have written: flush files to disk, rename into place, return the path."""
        partial, complete = self.partial_checkpoint_path(step), self.checkpoint_path(step)
        for folder, _, names in os.walk(partial):
            for name in names:
                _fsync(Path(folder) / name)
            _fsync(Path(folder))
        os.rename(partial, complete)
        _fsync(self.checkpoints_path)
        return complete

    def prune(self, keep: int, protect: Collection[int] = ()) -> list[int]:
        """Delete complete checkpoints except the ``keep`` newest and those of the steps ``protect``.

        Returns the deleted steps.
        """
        assert keep >= 1
        steps = [step for step in self.checkpoint_steps()[:-keep] if step not in protect]
        for step in steps:
            # Rename first: an interrupted deletion must not look like a checkpoint.
            doomed = self.checkpoints_path / f".step_{step}.deleted"
            os.rename(self.checkpoint_path(step), doomed)
            shutil.rmtree(doomed)
        return steps


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl: :func:`read_steps`."""
    return read_steps(run_dir / "metrics.jsonl")


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Read a file of one line per step, without a half-written last line; [] if it does not exist.

    Raises:
        UserError: another line is not a JSON object with an integer step.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    metrics = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline after it: the writer was killed here
                break
            raise UserError(f"{path}, line {number}: not valid JSON") from error
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise UserError(f"{path}, line {number}: not an object with an integer step")
        metrics.append(values)
    return metrics


def write_atomically(path: Path, text: str) -> None:
    """Replace the contents of ``path``; readers and a crash see either the old or the new file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Text of a broken tokenizer may hold lone surrogates; "\ud83d" is what JSON would write for one.
    with naming(path), open(temporary, "w", encoding="utf-8", errors="backslashreplace") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, **options: Any) -> str:
    """Dump strict JSON; non-finite numbers become strings (:func:`strict_json`)."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # a non-finite number: rare, and looking for one costs more than writing
        return json.dumps(strict_json(value), allow_nan=False, **options)


def _to_json_line(values: Mapping[str, Any]) -> str:
    return to_json(values, ensure_ascii=False) + "\n"


def strict_json(value: Any) -> Any:
    """Replace non-finite floats by strings, since JSON has no NaN and browsers reject it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    return value


def _is_free(field: str) -> bool:
    return any(field == free or field.startswith(free + ".") for free in _FREE_FIELDS)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of nested mappings; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return dotted name -> "field (was x, now y)" of the differing fields."""
    old_flat, new_flat = flatten(old), flatten(new)
    texts = {}
    for field in [*new_flat, *(field for field in old_flat if field not in new_flat)]:
        before, now = (json.dumps(flat[field]) if field in flat else "unset" for flat in (old_flat, new_flat))
        if before != now:
            texts[field] = f"{field} (was {before}, now {now})"
    return texts
