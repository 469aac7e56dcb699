"""Distinguish an engine's error from a worker process's death, from which the driver recovers."""

from __future__ import annotations

import multiprocessing.connection
import os
import sys
import traceback
from typing import Any

# A peer's broken connection is often noticed before the death itself.
PATIENCE_SECONDS = 5.0


def end_with_lost_worker(executor: Any, error: BaseException) -> None:
    """End this process if a dead tensor-parallel worker caused ``error``; else return.

    vLLM's monitor of its workers cancels running work before it calls back (build.build_engine), so a dead
    worker first shows as an error of a step or a call. Raised as such, it would end the run; as the actor's
    death, it makes the driver restart both.

    Args:
        executor: the engine's; without worker processes there is nothing to check.
        error: raised by a step or a call. vLLM's own failures are RuntimeErrors: for these, wait up to
            PATIENCE_SECONDS for a death. Others, such as a rejected request, are not delayed.
    """
    patience = PATIENCE_SECONDS if isinstance(error, RuntimeError) else 0.0
    if not lost_worker(executor, patience):
        return
    traceback.print_exception(error)
    print("A worker process of the engine is dead: the engine's process ends, to be replaced.", flush=True)
    sys.stderr.flush()
    os._exit(1)


def lost_worker(executor: Any, patience: float) -> bool:
    """Return True if a worker process of the executor is dead, or dies within ``patience`` seconds."""
    if getattr(executor, "is_failed", False):
        return True
    sentinels = [worker.proc.sentinel for worker in getattr(executor, "workers", None) or []]
    return bool(sentinels) and bool(multiprocessing.connection.wait(sentinels, timeout=patience))
