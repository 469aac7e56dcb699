"""The frame of every training loop: run directory, sinks, checkpoints, resume and signals."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from megarl import platform
from megarl.runs.provenance import append_start, describe_start
from megarl.runs.inputs import changes, find_inputs, read_inputs
from megarl.runs.memory_meter import MemoryMeter, as_metrics
from megarl.runs.model_card import write_card, write_chat_template
from megarl.runs.resuming import load, newest_whole, told_once
from megarl.runs.checkpoint_manager import CheckpointManager
from megarl.cluster import heartbeat
from megarl.cluster.heartbeat import Heartbeat
from megarl.config.hub import as_written
from megarl.config.load import public
from megarl.config.training import TrainingRoot
from megarl.errors import UserError, see
from megarl.metrics.checks import failures, non_finite
from megarl.metrics.console import Console
from megarl.metrics.profile import StepProfiler
from megarl.metrics.report import write_report
from megarl.metrics.sink import Rows, Sink
from megarl.metrics.sinks import build_sinks
from megarl.metrics.timeline import TimelineWriter
from megarl.metrics.timers import PhaseTimers
from megarl.models.table import Architecture
from megarl.platform import ranges, spans
from megarl.records import StepMetrics
from megarl.run_directory import RunDirectory, to_json, write_atomically
from megarl.cluster.collectives import broadcast, from_first_rank, on_first_rank
from megarl.trainer.interface import Checkpointable, Trainer
from megarl.weights.hf import export_hf, fingerprint
from megarl.weights.peft import export_adapter

Tensors = Iterator[tuple[str, torch.Tensor]]


_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(SystemExit):
    """Exits the process with the signal's exit code, after a checkpoint was written."""


class TrainingRun:
    """One training run on one rank; only rank 0 writes, but for heartbeats and timelines."""

    def __init__(self, config: TrainingRoot, kind: str, *, is_first: bool) -> None:
        self.config, self.kind, self.is_first = config, kind, is_first
        self.directory = RunDirectory(config.run.dir)
        self.console = Console(kind, enabled=is_first)
        self.timers = PhaseTimers(ranges.phase, start_hook=self._begin_steps)
        self.started = time.perf_counter()
        self._sinks: list[Sink] = []
        self._signal: int | None = None
        self.checkpoints = CheckpointManager(config.checkpoint, self.directory, self.console, is_first=is_first)
        self._values: dict[str, float] = {}
        self._last_step = 0
        self._checked, self._spoiled = 0, False  # last step passed to check(), and whether it failed
        self._odd: set[str] = set()  # non-finite metrics already reported
        self._base: dict[str, str] = {}  # with LoRA: fingerprint of the frozen weights, for the state
        self._heartbeat = Heartbeat(
            self.directory.ranks_path,
            dist.get_rank(),
            dist.get_world_size(),
            config.run.hang_timeout_seconds,
            lambda: (ranges.phase_stack(), ranges.progress()),
        )
        self.memory = MemoryMeter()
        self._spans = spans.Recorder()
        self._timeline: TimelineWriter | None = None
        self._profiler = StepProfiler(config.profile, self.directory.profile_path, dist.get_rank())
        self._resolved = public(config)

    # --- beginning and end --------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Open the run directory (rank 0); from now on SIGTERM, SIGINT and SIGHUP stop the run after a step."""
        on_first_rank(self._open)
        self._heartbeat.start()
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a shell's background job
                signal.signal(number, self._on_signal)
        return self

    def _open(self) -> None:
        chosen = self.config.model_dump(mode="json", exclude_defaults=True)
        lines = self.directory.open(self._resolved, chosen)
        self.console.keep_log(self.directory.console_path)
        for line in [*lines, *(f"note: {each}" for each in self.config.notes())]:
            self.console.note(line)
        self._look_at_inputs()
        heartbeat.clear(self.directory.ranks_path)

    def _look_at_inputs(self) -> None:
        """Report inputs that have changed since the run began, and store the current ones."""
        before = read_inputs(self.directory.inputs_path)
        now = find_inputs(self.config, before)
        has_begun = before is not None and bool(self.directory.checkpoint_steps())
        if lines := changes(before or {}, now) if has_begun else []:
            if self.config.run.on_changed_inputs == "refuse":
                raise UserError(
                    f"run.on_changed_inputs: {'; '.join(lines)}: restore it, choose another run.dir, or set warn "
                    "to go on with what is there now"
                )
            for line in lines:
                self.console.warn(f"{line}; it goes on with what is there now")
        write_atomically(self.directory.inputs_path, to_json(now, indent=1) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heartbeat.stop(error)
        if self.checkpoints.is_pending:  # an error ended the run: other ranks may be anywhere
            self.console.warn("the checkpoint that was being written is given up; the one before it stays")
        spans.record(None)
        for sink in self._sinks:
            sink.close()
        self.console.close()
        self.directory.close()
        if self._timeline is not None:
            self._timeline.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:  # a second signal exits at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = number
        if self.is_first:
            # Not through the console: its stream may be in the middle of a line, or broken.
            line = f"\n{signal.Signals(number).name}: ending after this step, with a checkpoint\n"
            with suppress(OSError):
                os.write(sys.stderr.fileno(), line.encode())

    def tell(self, *data: Any) -> None:
        """Print the load reports of datasets (None is skipped), those of a stream as it reads on."""
        for each in (each for each in data if each is not None):
            for report in each.reports:
                for line in report.lines():
                    self.console.note(line)
            if each.stream is not None:
                each.stream.tell, each.stream.tick = self._tell_window, ranges.tick

    def _tell_window(self, report: Any) -> None:
        say = self.console.note if report.bad.count else self.console.detail
        for line in [*report.lines(), f"{report.key}: {report.num_used:,} of {report.num_rows:,} used"]:
            say(line)

    # --- checkpoints --------------------------------------------------------------------------

    def resume(self, policy: Checkpointable) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint into ``policy``; return its state, None for a new run.

        A damaged checkpoint is renamed with a warning, and the one before it is used.

        Raises:
            UserError: there are checkpoints, but the run can resume from none.
        """
        if self.config.lora is not None:
            self._base = {"base": from_first_rank(lambda: fingerprint(self.config.model.path))}
        state = None
        if (found := newest_whole(self.directory, self.console)) is not None:
            path, state = found
            self._check_base(state)
            if not load(policy, path, state, self.config.training.num_steps):
                self.console.warn(
                    "random states start anew: another number of ranks, or another kind of device, wrote the "
                    "checkpoint"
                )
            self.console.note(f"Resuming from {path} (step {state['step']})")
        if self.is_first:
            self.directory.start_after(state["step"] if state else None)
        self._last_step = state["step"] if state else 0
        self._timeline = TimelineWriter(
            self.directory.timeline_path,
            dist.get_rank(),
            dist.get_world_size(),
            state["step"] if state else -1,
        )
        if self.is_first:
            with self.console.waiting("starting the sinks"):
                self._sinks = build_sinks(self.config.logging, self.directory, self._resolved)
            for sink in self._sinks:
                if sink.url:
                    self.console.note(f"{type(sink).__name__.removesuffix('Sink')}: {sink.url}")
        return state

    def record_start(self, active_parameters: int, memory: dict[str, int]) -> None:
        """Add this start of the run to provenance.jsonl (rank 0)."""
        if self.is_first:
            start = describe_start(dist.get_world_size(), active_parameters, memory)
            append_start(self.directory.provenance_path, start)

    def begin_steps(self) -> None:
        """Begin the console's bar and the time left; comes after :meth:`resume`, before the first step."""
        total, interval = self.config.training.num_steps, self.config.logging.interval
        self._spans.start()
        spans.record(self._spans)
        self.console.begin_steps(total, self._last_step, interval)

    def _check_base(self, state: Mapping[str, Any]) -> None:
        """Raise UserError if the base weights of an adapter checkpoint have changed."""
        if self._base and state.get("base") != self._base["base"]:
            raise UserError(
                f"model.path: {self.config.model.path} holds other weights than when this run began, whose "
                "checkpoints have adapters alone; restore them or choose another run.dir"
            )

    def after_step(self, step: int, last_step: int, policy: Checkpointable, state: Mapping[str, Any]) -> None:
        """Save a checkpoint if due; exit the process if a signal was received."""
        self.checkpoints.poll()
        number = self.signal_number()
        interval = self.config.checkpoint.interval
        due = step == last_step or (interval and step % interval == 0)
        assert self._checked == step, "check() comes before after_step()"
        if self._spoiled and step == last_step:
            self.checkpoints.wait()
            raise self._failed(step, ["the last step was not finite"])
        if self._spoiled and (due or number is not None):
            self.console.warn(f"step {step} is not saved: it was not finite")
        elif due or number is not None:
            self.checkpoints.save(step, policy, {**state, **self._base}, self._values)
        if step == last_step or number is not None:
            self.checkpoints.wait()
        if self.is_first and (due or step % self.config.logging.report_interval == 0):
            write_report(self.directory.path)
        if number is not None and step != last_step:
            name = signal.Signals(number).name
            self.console.note(f"{name}: stopped at step {step} with a checkpoint; the same command resumes")
            # srun and torchrun kill the other ranks when one exits with this code: rank 0 must be done.
            broadcast(None)
            raise Interrupted(128 + number)

    def signal_number(self) -> int | None:
        """Return the signal received by rank 0, the same on every rank, or None."""
        number: int | None = broadcast(self._signal)
        return number

    def export(self, policy: Trainer, architecture: Architecture) -> None:
        """Export the weights as a Hugging Face directory, <run.dir>/hf, unless disabled.

        With LoRA: merged weights, the adapters as <run.dir>/adapter, or both.
        """
        if not self.config.checkpoint.export_hf:
            return
        lora, base = self.config.lora, self.config.model.path
        with ranges.phase("export"), self.console.waiting("exporting the weights"):
            if lora is None or lora.export != "adapter":
                tensors, target = policy.weights.hf_tensors(), self.directory.path / "hf"
                self._write(tensors, partial(export_hf, target, base, architecture))
                if self.is_first:
                    write_chat_template(target, self.config.data.format)
            if lora is not None and lora.export != "merged":
                tensors, target = policy.weights.adapter_tensors(), self.directory.path / "adapter"
                self._write(tensors, partial(export_adapter, target, as_written(base), architecture, lora))

    def _write(self, tensors: Tensors, write: Callable[[Tensors], None]) -> None:
        if self.is_first:
            write(tensors)
        else:
            for _ in tensors:  # every rank takes part in the gathering
                pass

    # --- figures ------------------------------------------------------------------------------

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Stop the run, or warn if so configured, if the metrics of ``step`` show that it failed.

        Collective, with equal values, before anything reads the new weights.

        Raises:
            UserError: a loss, a gradient norm or a weight is NaN or infinite. The metrics are in metrics.jsonl
                and the report; nothing of the step is saved.
        """
        found = failures(values)
        self._checked, self._spoiled = step, bool(found)
        if not found:
            return
        if self.config.run.on_non_finite == "warn":
            self.console.warn(f"step {step}: {', '.join(found)}")
            return
        self.log(step, dict(values))
        self.checkpoints.wait()  # a valid one may be in progress
        if self.is_first:
            write_report(self.directory.path)
        raise self._failed(step, found)

    def _failed(self, step: int, found: list[str]) -> UserError:
        """Return the error of a run that has failed."""
        kept = self.directory.latest_checkpoint()
        line = (
            f"step {step}: {', '.join(found)}. The run ends here and saves nothing of this step; the latest "
            f"checkpoint is {'none' if kept is None else kept}. Most often optimizer.lr is too large; "
            "debug.check_numerics names the first bad token, run.on_non_finite: warn goes on"
            + see("not-finite")
        )
        return told_once(line)

    def log(self, step: int, values: dict[str, float]) -> None:
        """End the timers of the step and send its metrics to all sinks and the console (rank 0)."""
        odd = non_finite(values)
        if new := [f"{name} is {odd[name]}" for name in odd if name not in self._odd]:
            self.console.warn(f"step {step}: {', '.join(new)}")
        self._odd |= odd.keys()
        values = values | self.timers.end_step()
        memory = self.memory.read()
        values |= as_metrics(memory)
        if self._timeline is not None:
            self._timeline.write(step, {**self._spans.take().row(), "memory": memory})
        if (path := self._profiler.end(step)) is not None:
            self.console.note(f"profile of step {step}: {path}")
        self._last_step = step
        values["peak_memory_gib"] = platform.peak_memory_gib()
        if self.config.checkpoint.async_save:
            values["seconds_checkpoint_blocked"] = self.checkpoints.take_blocked_seconds()
        self._values = values
        if self.is_first:
            for sink in self._sinks:
                sink.log(step, values)
            self.console.step(StepMetrics(step, values))
        self._begin_steps()

    def _begin_steps(self) -> None:
        """Set the heartbeat's step to the next one and trace it if selected."""
        self._heartbeat.step = self._last_step + 1
        self._profiler.begin(self._last_step + 1)

    def write_samples(self, step: int, rows: Rows) -> None:
        """Write samples/step_N.jsonl; every logging.report_interval steps they also go to the sinks (rank 0)."""
        self.directory.write_samples(step, rows)
        if step % self.config.logging.report_interval == 0 or step == self.config.training.num_steps:
            for sink in self._sinks:
                sink.log_rows("samples", step, rows)

    def write_evaluation(self, step: int, rows: Rows) -> None:
        """Write evaluations/step_N.jsonl, and send it to the sinks (rank 0)."""
        self.directory.write_evaluation(step, rows)
        for sink in self._sinks:
            sink.log_rows("evaluations", step, rows)

    def seconds_so_far(self) -> float:
        """Return the wall time of this process's run, start-up included."""
        return time.perf_counter() - self.started

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json and the report, and print its path."""
        if self.is_first:
            self.directory.write_summary(summary)
            for name in ("hf", "adapter"):
                if (self.directory.path / name).is_dir():
                    write_card(self.directory.path / name, self.kind, self.config, summary)
            report = write_report(self.directory.path)
            self.console.note(f"Report: {report} (open it in a browser)")
