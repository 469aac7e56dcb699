"""Save checkpoints in the foreground or background; keep the newest and the best."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.config.checkpoint import CheckpointConfig
from megarl.metrics.console import Console
from megarl.platform import ranges
from megarl.run_directory import RunDirectory
from megarl.trainer.checksums import seal
from megarl.cluster.collectives import barrier, gather
from megarl.trainer.interface import PendingSave, Checkpointable

STATE_FILE = "run_state.json"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the loop state stored with a checkpoint; {} if it is unreadable."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) and isinstance(state.get("step"), int) else {}


@dataclass(slots=True)
class _Pending:
    step: int
    save: PendingSave
    state: str
    started: float
    blocked: float


class CheckpointManager:
    """Checkpoints of one run on one rank. All methods are collective, in the same order; rank 0 commits.

    A background checkpoint is committed between two steps, by all ranks together: background threads never
    communicate.
    """

    def __init__(
        self, config: CheckpointConfig, directory: RunDirectory, console: Console, *, is_first: bool
    ) -> None:
        self._config, self._directory, self._console = config, directory, console
        self._is_first = is_first
        self._pending: _Pending | None = None
        self.blocked_seconds = 0.0
        """Seconds that steps waited for background saves since :meth:`take_blocked_seconds`."""

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._pending is not None

    def save(self, step: int, policy: Checkpointable, state: Mapping[str, Any], values: Mapping[str, float]) -> None:
        """Write, or start writing, the checkpoint of ``step``, whose metrics are ``values``."""
        self.wait()
        with ranges.phase("checkpoint"):
            self._save(step, policy, state, values)

    def _save(
        self, step: int, policy: Checkpointable, state: Mapping[str, Any], values: Mapping[str, float]
    ) -> None:
        began = time.perf_counter()
        config = self._config
        text = json.dumps(
            {"step": step, "optimizer": config.save_optimizer, **state, **self._rank_of(step, values)}
        )
        partial = self._directory.partial_checkpoint_path(step)
        if self._is_first:
            self._directory.begin_checkpoint(step)
        barrier()
        if not config.async_save:
            policy.save(partial, optimizer=config.save_optimizer)
            barrier()
            self._commit(step, text)
            return
        pending = policy.start_save(partial, optimizer=config.save_optimizer)
        blocked = time.perf_counter() - began
        self.blocked_seconds += blocked
        self._pending = _Pending(step, pending, text, began, blocked)

    def poll(self) -> None:
        """Commit the background checkpoint if all ranks have written it; do not wait."""
        if self._pending is not None and all(gather(self._pending.save.done())):
            self.wait()

    def wait(self) -> None:
        """Wait until all ranks have written the background checkpoint, and commit it."""
        if self._pending is None:
            return
        began, pending = time.perf_counter(), self._pending
        self._pending = None
        with ranges.phase("checkpoint"):
            pending.save.finish()
            self._commit(pending.step, pending.state)
        pending.blocked += time.perf_counter() - began
        self.blocked_seconds += time.perf_counter() - began
        self._console.note(
            f"checkpoint step_{pending.step}: steps waited {pending.blocked:.2f} s for it, "
            f"complete after {time.perf_counter() - pending.started:.2f} s in the background"
        )

    def take_blocked_seconds(self) -> float:
        """Return and reset the seconds that steps waited for background saves."""
        seconds, self.blocked_seconds = self.blocked_seconds, 0.0
        return seconds

    def _commit(self, step: int, state: str) -> None:
        if self._is_first:
            partial = self._directory.partial_checkpoint_path(step)
            (partial / STATE_FILE).write_text(state)
            seal(partial)
            self._directory.commit_checkpoint(step)
            best = self._best()
            if best == step and self._config.keep_best_metric:
                self._console.note(
                    f"checkpoint step_{step} has the best {self._config.keep_best_metric} so far"
                )
            self._directory.prune(self._config.keep, protect=() if best is None else (best,))

    # --- the best one -------------------------------------------------------------------------

    def _rank_of(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Return the entry that ranks a checkpoint by keep_best_metric; {} without one."""
        name = self._config.keep_best_metric
        if name is None:
            return {}
        value = values.get(name)
        if value is None or value != value:
            known = "is NaN there" if value is not None else f"that step has {', '.join(sorted(values))}"
            self._console.warn(
                f"checkpoint.keep_best_metric: step {step} has no {name}, so its checkpoint cannot be the "
                f"best one ({known})"
            )
            return {}
        return {"best": {"metric": name, "value": float(value)}}

    def _best(self) -> int | None:
        """Return the step of the checkpoint with the best value, the earliest if equal; None without one."""
        name = self._config.keep_best_metric
        if name is None:
            return None
        found = {}
        for step in self._directory.checkpoint_steps():
            best = read_state(self._directory.checkpoint_path(step)).get("best") or {}
            if best.get("metric") == name:
                found[step] = best["value"] * (1 if self._config.keep_best_mode == "max" else -1)
        return max(found, key=lambda step: (found[step], -step)) if found else None
