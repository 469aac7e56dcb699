"""The run directory: everything a run leaves behind, and what it resumes from.

::

    runs/<name>/
      config.yaml             resolved configuration
      console.log             what the console showed, whatever became of the terminal
      inputs.json             sizes and checksums of what the run reads beside it
      metrics.jsonl           one JSON object per step
      samples/step_N.jsonl    samples of step N
      evaluations/step_N.jsonl  every answer of the evaluation after step N (0: before the first)
      checkpoints/step_N/     complete by construction: renamed into place when all of it is on disk
                              (step_N.damaged: one that a resumed run has found not to be what was written)
      summary.json            headline figures, written at the end
      report.html             rewritten as the run goes
      ranks/                  what every trainer rank is doing, and why the run failed if it did
      profile/                traces of the steps in profile.steps
      .lock                   held while a process runs here

Rank 0 opens the directory and writes; other ranks only ask it for paths and checkpoints.
Order of use on rank 0: ``open`` -> load ``latest_checkpoint()`` if there is one -> ``start_after`` ->
``append_metrics`` / ``write_samples`` / ``begin_checkpoint`` + ``commit_checkpoint`` per step -> ``close``.
A step's metrics are appended before its checkpoint is committed, so that no resumed run lacks a line.
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

if TYPE_CHECKING:
    from megarl.config.training import TrainingRoot

# Fields a resumed run may change: they alter what is written down, where it runs or when it ends, not what
# is learned (up to rounding).
_FREE_FIELDS = (
    *("run.dir", "run.hang_timeout_seconds", "run.on_non_finite", "run.on_changed_inputs"),
    *("logging", "checkpoint", "profile", "launcher", "parallel", "training.num_steps"),
    *("reference.cache_dir", "lora.export", "rollout.engine.data_parallel_size"),
)

_CHECKPOINT_NAME = re.compile(r"step_(\d+)")
_SAMPLES_NAME = re.compile(r"step_(\d+)\.jsonl")


class RunDirectory:
    """Paths, lock, metrics, samples and checkpoints of one run. Creating the object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.console_path = self.path / "console.log"
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples"
        self.evaluations_path = self.path / "evaluations"
        self.checkpoints_path = self.path / "checkpoints"
        self.summary_path = self.path / "summary.json"
        self.report_path = self.path / "report.html"
        self.ranks_path = self.path / "ranks"
        self.profile_path = self.path / "profile"
        self.tensorboard_path = self.path / "tensorboard"
        self.started_after: int | None = None
        """Step the run went on from (None: from the beginning); set by :meth:`start_after`."""
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None

    # --- opening and closing ---------------------------------------------------------------------

    def open(self, resolved_config: Mapping[str, Any], chosen: Mapping[str, Any] | None = None) -> list[str]:
        """Take the lock, check that the configuration continues the one on disk, and write it.

        Args:
            resolved_config: plain data (what pydantic's ``model_dump(mode="json")`` gives).
            chosen: the part of it that is not at its default. A field that the directory's configuration
                lacks, because MegaRL did not have it yet, is no change at its default; None: it always is.

        Returns:
            One line per field that a resumed run is free to change and did, for the log.

        Raises:
            UserError: another process runs here; the directory cannot be written; or it belongs to a
                run whose configuration differs in a field that changes the training.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise UserError(f"run.dir: cannot write to {self.path} ({error.strerror})") from error
        try:
            changes = self._compare_with_disk(resolved_config, chosen)
        except UserError:
            self.close()
            raise
        self._remove_leftovers()
        self.samples_path.mkdir(exist_ok=True)
        self.checkpoints_path.mkdir(exist_ok=True)
        write_atomically(self.config_path, dump_yaml(dict(resolved_config)))
        return changes

    def check_before_start(self, config: TrainingRoot) -> str | None:
        """What the directory's files alone decide, before a rank is started and without taking the lock.

        Returns:
            Where the run is complete (its last checkpoint, its summary and its export are there), a line that
            says so; else None.

        Raises:
            UserError: the run was started with other values of what changes the training.
        """
        if not self.config_path.exists():
            return None
        resolved = config.model_dump(mode="json")
        self._compare_with_disk(resolved, config.model_dump(mode="json", exclude_defaults=True))
        steps, saved = config.training.num_steps, self.checkpoint_steps()
        exported = not config.checkpoint.export_hf or any(
            (self.path / name).is_dir() for name in ("hf", "adapter")
        )
        if not (saved and saved[-1] >= steps and exported and self.summary_path.exists()):
            return None
        return (
            f"{self.path}: complete, {saved[-1]} of {steps} steps. A larger training.num_steps goes on from "
            f"here, another run.dir starts afresh. Report: {self.report_path}"
        )

    def close(self) -> None:
        """Close metrics.jsonl and give the lock back. Safe to call twice."""
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
        # POSIX record locks rather than flock: they belong to the process, so a forked child that
        # outlives a killed trainer does not keep the directory locked.
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
        old = parse_yaml(self.config_path.read_text(encoding="utf-8"), str(self.config_path)).value
        if not isinstance(old, dict):
            raise UserError(f"{self.config_path}: not a configuration; choose another run.dir")
        old = with_new_names(old)
        differing = _differences(old, parse_yaml(dump_yaml(dict(resolved_config)), "config.yaml").value)
        if chosen is not None:
            known = _flatten(old).keys() | _flatten(chosen).keys()
            differing = {field: text for field, text in differing.items() if field in known}
        free = [text for field, text in differing.items() if _is_free(field)]
        binding = [text for field, text in differing.items() if not _is_free(field)]
        # A run that has neither trained a step nor saved one has nothing that new values could spoil.
        has_begun = bool(self.checkpoint_steps()) or bool(read_metrics(self.path))
        if binding and has_begun:
            raise UserError(
                f"run.dir: {self.path} was started with other values: {'; '.join(binding)}. "
                "Set a new run.dir to start afresh, or restore the old values to go on"
            )
        return free + binding

    def _remove_leftovers(self) -> None:
        """Delete what an interrupted save, deletion or atomic write left behind (we hold the lock)."""
        for folder in (self.path, self.samples_path, self.evaluations_path, self.checkpoints_path):
            for pattern in (".*.tmp", ".step_*.partial", ".step_*.deleted"):
                for leftover in folder.glob(pattern):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    # --- metrics and samples ---------------------------------------------------------------------

    def start_after(self, step: int | None) -> None:
        """Forget what lies beyond ``step``, the last one the loaded checkpoint contains.

        metrics.jsonl loses, in one atomic replacement, every line with a larger step and a line that a
        killed process wrote half; samples and evaluations of later steps go too. None starts from the
        beginning and forgets all. Call it once, before the first ``append_metrics``, on a fresh run too.

        Raises:
            UserError: metrics.jsonl has a line, other than its last, that is not a JSON object with a step.
        """
        assert self._lock is not None, "open() the run directory first"
        last = -1 if step is None else step
        kept = [line for line in read_metrics(self.path) if line["step"] <= last]
        write_atomically(self.metrics_path, "".join(_to_json_line(line) for line in kept))
        evaluations = self.evaluations_path.glob("*")  # only runs that evaluate have the folder
        for path in [*self.samples_path.iterdir(), *evaluations]:
            match = _SAMPLES_NAME.fullmatch(path.name)
            if match and int(match[1]) > last:
                path.unlink()
        self.started_after = step
        self._metrics = open(self.metrics_path, "a", encoding="utf-8")  # noqa: SIM115 (close() closes it)

    def append_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line ``{"step": step, **values}`` and put it on disk.

        Lines are strict JSON: non-finite values become the strings "NaN", "Infinity", "-Infinity", which
        ``float`` reads. Further values of the same step (an evaluation after it) are a second line.
        """
        assert self._metrics is not None, "call start_after() before the first step"
        self._metrics.write(_to_json_line({"step": step, **values}))
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    def write_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> Path:
        """Write samples/step_N.jsonl atomically.

        Keys the report shows: step, prompt_index, prompt, response, answer, reward, advantage,
        finish_reason, policy_version, num_response_tokens, info, and optionally rollout_logprobs [N] with
        response_tokens [N] (each token's text).
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
        """Steps of the complete checkpoints, oldest first."""
        if not self.checkpoints_path.is_dir():
            return []
        matches = (_CHECKPOINT_NAME.fullmatch(path.name) for path in self.checkpoints_path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def checkpoint_path(self, step: int) -> Path:
        """Where the complete checkpoint of a step lies."""
        return self.checkpoints_path / f"step_{step}"

    def partial_checkpoint_path(self, step: int) -> Path:
        """Where all ranks write the checkpoint of a step before rank 0 commits it."""
        return self.checkpoints_path / f".step_{step}.partial"

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None. Interrupted saves are never seen."""
        steps = self.checkpoint_steps()
        return self.checkpoint_path(steps[-1]) if steps else None

    def set_aside(self, step: int) -> Path:
        """Rank 0: take a damaged checkpoint out of the list; returns where it is kept."""
        path = self.checkpoint_path(step)
        names = (f"{path.name}.damaged{number or ''}" for number in itertools.count())
        kept = next(each for each in map(path.with_name, names) if not each.exists())
        os.rename(path, kept)
        _fsync(self.checkpoints_path)
        return kept

    def begin_checkpoint(self, step: int) -> Path:
        """Rank 0, before the others write: an empty directory at ``partial_checkpoint_path(step)``."""
        assert not self.checkpoint_path(step).exists(), f"step {step} is already saved in {self.path}"
        partial = self.partial_checkpoint_path(step)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        return partial

    def commit_checkpoint(self, step: int) -> Path:
        """Rank 0, after every rank has written: flush all files to disk, then rename into place."""
        partial, complete = self.partial_checkpoint_path(step), self.checkpoint_path(step)
        for folder, _, names in os.walk(partial):
            for name in names:
                _fsync(Path(folder) / name)
            _fsync(Path(folder))
        os.rename(partial, complete)
        _fsync(self.checkpoints_path)
        return complete

    def prune(self, keep: int, protect: Collection[int] = ()) -> list[int]:
        """Delete all but the ``keep`` newest complete checkpoints and those of the steps ``protect``.

        Returns the deleted steps.
        """
        assert keep >= 1
        steps = [step for step in self.checkpoint_steps()[:-keep] if step not in protect]
        for step in steps:
            # Renamed first: a deletion that is cut short must not look like a checkpoint.
            doomed = self.checkpoints_path / f".step_{step}.deleted"
            os.rename(self.checkpoint_path(step), doomed)
            shutil.rmtree(doomed)
        return steps


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as written; a half-written last line is left out.

    Raises:
        UserError: another line is not a JSON object with an integer step.
    """
    path = run_dir / "metrics.jsonl"
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
    """Replace ``path`` by ``text``: readers, and a crash at any moment, see the old or the new file whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Text of a broken tokenizer may hold lone surrogates; "\ud83d" is what JSON would write for one.
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as handle:
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
    """``json.dumps`` that writes strict JSON: see :func:`strict_json` for non-finite numbers."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # a non-finite number: rare, and looking for one costs more than writing
        return json.dumps(strict_json(value), allow_nan=False, **options)


def _to_json_line(values: Mapping[str, Any]) -> str:
    return to_json(values, ensure_ascii=False) + "\n"


def strict_json(value: Any) -> Any:
    """Non-finite floats as strings, since JSON has no NaN and browsers refuse to read one."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    return value


def _is_free(field: str) -> bool:
    return any(field == free or field.startswith(free + ".") for free in _FREE_FIELDS)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Differing fields by dotted name, each with a text "field (was x, now y)"."""
    old_flat, new_flat = _flatten(old), _flatten(new)
    texts = {}
    for field in [*new_flat, *(field for field in old_flat if field not in new_flat)]:
        before, now = (json.dumps(flat[field]) if field in flat else "unset" for flat in (old_flat, new_flat))
        if before != now:
            texts[field] = f"{field} (was {before}, now {now})"
    return texts
