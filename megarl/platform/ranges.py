"""Named ranges of this process's work, for NVTX, the profiler and the diagnosis of hangs.

A range is pushed on a stack that another thread may read at any time; on a GPU it is also an NVTX range, and
while a torch profiler runs, a labelled event of its trace. Only the main thread opens ranges.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megarl.platform import spans

_stack: list[str] = []
_broken: tuple[str, ...] = ()  # the stack at the latest error
_progress = 0


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Attribute everything inside the ``with`` block to ``name``; may be nested."""
    global _broken
    on_gpu = torch.cuda.is_initialized()  # NVTX ranges are useless on a CPU
    if on_gpu:
        torch.cuda.nvtx.range_push(name)
    _stack.append(name)
    _broken = ()
    tick()
    try:
        with spans.span(name), torch.profiler.record_function(name):
            yield
    except BaseException:
        _broken = _broken or tuple(_stack)
        raise
    finally:
        _stack.pop()
        tick()
        if on_gpu:
            torch.cuda.nvtx.range_pop()


def tick() -> None:
    """Record progress: a finished microbatch, sample or phase. Without it for long, a hang is assumed."""
    global _progress
    _progress += 1


def phase_stack() -> tuple[str, ...]:
    """Return the open ranges, outermost first; after an error, those it came out of."""
    return tuple(_stack) or _broken


def progress() -> int:
    """Return a counter of ranges that began or ended and calls of :func:`tick`."""
    return _progress
