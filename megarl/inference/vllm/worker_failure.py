"""Telling an engine's error from the death of one of its worker processes, which the driver mends."""

from __future__ import annotations

import multiprocessing.connection
import os
import sys
import traceback
from typing import Any

# A peer's broken connection is often noticed before the death itself.
PATIENCE_SECONDS = 5.0


def end_with_lost_worker(executor: Any, error: BaseException) -> None:
    """End this process if ``error`` comes of a dead tensor-parallel worker; else return.

    vLLM's monitor of its workers cancels what is under way before it calls back (build.build_engine), so
    a dead worker first shows as an error of a step or of a call. Handed on as such it would end the run; as
    the death of the actor it has the driver start both anew.

    Args:
        executor: the engine's; without worker processes there is nothing to lose.
        error: what a step or a call raised. vLLM's own failures are RuntimeErrors: for these a death is
            waited for, PATIENCE_SECONDS long. Others, such as a refused request, are not held up.
    """
    patience = PATIENCE_SECONDS if isinstance(error, RuntimeError) else 0.0
    if not lost_worker(executor, patience):
        return
    traceback.print_exception(error)
    print("A worker process of the engine is dead: the engine's process ends, to be replaced.", flush=True)
    sys.stderr.flush()
    os._exit(1)


def lost_worker(executor: Any, patience: float) -> bool:
    """Whether a worker process of the executor is dead, or dies within ``patience`` seconds."""
    if getattr(executor, "is_failed", False):
        return True
    sentinels = [worker.proc.sentinel for worker in getattr(executor, "workers", None) or []]
    return bool(sentinels) and bool(multiprocessing.connection.wait(sentinels, timeout=patience))
