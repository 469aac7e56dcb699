"""Trainer ranks for tests: processes that run one function after another, each under its own layout.

Importing Megatron takes seconds and the platform can be installed once per process, so the processes
stay for the whole session; process groups come and go with every call.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


class RankError(Exception):
    """An exception of a rank, with its traceback."""


class World:
    """``size`` ranks. ``run`` returns the results of all ranks, in rank order."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.size = size
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(
        self, function: Callable[..., Any], *args: Any, parallel: dict[str, Any] | None = None
    ) -> list[Any]:
        """``function(context, *args)`` on every rank, inside process groups of the layout ``parallel``."""
        port = _free_port()
        for connection in self.connections:
            connection.send((port, parallel or {}, function, args))
        try:
            return self._results()
        except BaseException:  # a failure, or the test's time is over: ranks may wait for each other for ever
            self.close()
            raise

    def _results(self) -> list[Any]:
        results: list[Any] = [None] * self.size
        pending = set(self.connections)
        while pending:
            for connection in wait(list(pending)):
                assert isinstance(connection, Connection)
                rank = self.connections.index(connection)
                try:
                    failed, results[rank] = connection.recv()
                except EOFError:
                    failed, results[rank] = True, "the process died"
                if failed:
                    raise RankError(f"rank {rank}: {results[rank]}")
                pending.discard(connection)
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.connections.clear()


@functools.cache
def _cached(size: int) -> list[World]:
    return [World(size)]


def world(size: int) -> World:
    """The session's ranks; new ones after a failure."""
    box = _cached(size)
    if not box[0].connections:
        box[0] = World(size)
    return box[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(rank: int, size: int, connection: Connection) -> None:
    os.environ["MEGARL_PLATFORM"] = "cpu"
    while True:
        try:
            port, parallel, function, args = connection.recv()
        except EOFError:  # the tests are over
            return
        if size > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        try:
            answer = (False, _inside_groups(parallel, function, args))
        except BaseException:
            answer = (True, traceback.format_exc())
        connection.send(answer)


def _inside_groups(parallel: dict[str, Any], function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch

    from megarl.config.parallel import ParallelConfig
    from megarl.trainer.megatron.initialize import finalize, initialize

    torch.set_num_threads(1)
    context = initialize(ParallelConfig(**parallel), seed=1)
    try:
        return function(context, *args)
    finally:
        finalize()
        gc.collect()
