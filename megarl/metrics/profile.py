"""Chrome traces of chosen steps (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megarl.config.run import ProfileConfig


class StepProfiler:
    """Traces whole steps of one rank; ranges of :mod:`megarl.platform.ranges` are events of the trace."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._steps = config.traced if rank in config.ranks else frozenset()
        self._running: tuple[int, Any] | None = None

    def begin(self, step: int) -> None:
        """Start tracing if ``step`` is selected."""
        self.discard()
        if step not in self._steps:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_initialized():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=activities)
        profiler.start()
        self._running = (step, profiler)

    def end(self, step: int) -> Path | None:
        """Stop tracing ``step`` and write its trace; return the file, or None."""
        if self._running is None or self._running[0] != step:
            return None
        _, profiler = self._running
        self._running = None
        profiler.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"step_{step}_rank_{self._rank}.json"
        profiler.export_chrome_trace(str(path))
        return path

    def discard(self) -> None:
        """Discard an unfinished trace."""
        if self._running is not None:
            self._running[1].stop()
            self._running = None
