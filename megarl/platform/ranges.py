"""Named ranges: what this process is doing, for NVTX, the profiler and whoever looks for a hang.

A range is pushed on a stack that another thread may read at any time; on a GPU it is an NVTX range as
well, and while a torch profiler runs, a labelled event of its trace. Only the main thread opens ranges.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_stack: list[str] = []
_broken: tuple[str, ...] = ()  # the stack that the latest error came out of
_progress = 0


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Everything inside the ``with`` block belongs to ``name``; may be nested."""
    global _broken
    on_gpu = torch.cuda.is_initialized()  # on a CPU there is nobody to show NVTX ranges to
    if on_gpu:
        torch.cuda.nvtx.range_push(name)
    _stack.append(name)
    _broken = ()
    tick()
    try:
        with torch.profiler.record_function(name):
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
    """Something was finished: a microbatch, a sample, a phase. Long silence is taken for a hang."""
    global _progress
    _progress += 1


def phase_stack() -> tuple[str, ...]:
    """The open ranges, outermost first; after an error has left all of them, those it came out of."""
    return tuple(_stack) or _broken


def progress() -> int:
    """A number that grows with every range that begins or ends and every :func:`tick`."""
    return _progress
