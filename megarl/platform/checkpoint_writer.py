"""Writing a Megatron checkpoint's files in the process (and thread) that calls.

Megatron forks writers, which a process with OpenMP, CUDA or Ray threads must not.
"""

from __future__ import annotations

import queue
from typing import Any


class _Uncounted:
    def get(self) -> None:
        pass

    def task_done(self) -> None:
        pass


def write_in_process(
    transform_list: Any, use_msc: bool, rank: int, write_buckets: list[Any], results: queue.Queue[Any]
) -> None:
    """Stands in for ``FileSystemWriterAsync.write_preloaded_data_multiproc``; every file ends on disk.

    An error of writing becomes the result, which Megatron raises on every rank when it collects them.
    """
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem

    written: Any = {}
    for number, bucket in enumerate(write_buckets):
        answer: queue.Queue[Any] = queue.Queue()
        filesystem.FileSystemWriterAsync.write_preloaded_data(
            transform_list, number, bucket, answer, _Uncounted(), True
        )
        _, outcome = answer.get()
        if isinstance(outcome, Exception):
            written = outcome
            break
        written[number] = outcome
    results.put(written)
