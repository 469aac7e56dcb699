"""Many answers to a call: what has arrived while a worker judged goes to it together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megarl.environments.base import StepResult
from megarl.environments.process import EnvironmentFailureError, ProcessEndedError, WorkerProcess
from megarl.environments.worker import Answers

if TYPE_CHECKING:
    from megarl.records import Prompt, TokenIds

# A call to a worker that judges one answer at a time is to take about so long: what it costs to send is then
# a few percent, and few have to be judged again when one of them ends the process.
_CALL_SECONDS = 0.05
_MOST_ANSWERS = 512  # of one call


@dataclass(slots=True)
class _Waiting:
    prompt: Prompt
    sampled: TokenIds
    result: asyncio.Future[StepResult]
    alone: bool  # it may end the process that judges it


class Judges:
    """Workers of one verifier, and the answers that wait for them; for one event loop at a time.

    A failure concerns the answer that it is of. Where a process dies or hangs with several answers in it of
    which it judged one at a time, all are judged again, each alone: only the one that does it again is to
    blame. Where it worked on several at a time, they are not told apart (see WorkerProcess), and all but one
    are blameless.
    """

    def __init__(self, workers: Sequence[WorkerProcess], max_concurrency: int) -> None:
        self._workers, self._max_concurrency = workers, max_concurrency
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[_Waiting] = deque()
        self._calls: set[asyncio.Task[None]] = set()
        self._is_dealing = False
        self._seconds = _CALL_SECONDS  # of one judgement, lately
        self._suspects: set[tuple[int, bytes]] = set()  # answers that have ended a process

    async def judge(self, prompt: Prompt, sampled: TokenIds) -> StepResult:
        """Return the verifier's result for one response; raise EnvironmentFailureError."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._enter(loop)
        alone = bool(self._suspects) and _key(prompt, sampled) in self._suspects
        waiting = _Waiting(prompt, sampled, loop.create_future(), alone)
        self._waiting.append(waiting)
        self._deal_soon()
        return await waiting.result

    def _enter(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._is_dealing = loop, False
        self._waiting.clear()
        self._calls.clear()
        for worker in self._workers:
            worker.enter_loop()

    def _deal_soon(self) -> None:
        if not self._is_dealing:
            self._is_dealing = True
            assert self._loop is not None
            self._loop.call_soon(self._deal)

    def _deal(self) -> None:
        """Give every worker that has room its share of what waits."""
        self._is_dealing = False
        share = -(-len(self._waiting) // len(self._workers))
        for worker in sorted(self._workers, key=lambda worker: worker.num_answers):
            count = min(self._room(worker), share, len(self._waiting))
            if count > 0:
                self._give(worker, count)

    def _room(self, worker: WorkerProcess) -> int:
        if self._max_concurrency > 1:
            return self._max_concurrency - worker.num_answers
        if worker.num_answers:
            return 0
        return min(max(int(_CALL_SECONDS / self._seconds), 1), _MOST_ANSWERS)

    def _give(self, worker: WorkerProcess, count: int) -> None:
        batch = [self._waiting.popleft()]
        while len(batch) < count and not (batch[0].alone or self._waiting[0].alone):
            batch.append(self._waiting.popleft())
        worker.num_answers += len(batch)
        assert self._loop is not None
        call = self._loop.create_task(self._call(worker, batch))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _call(self, worker: WorkerProcess, batch: list[_Waiting]) -> None:
        left = dict(enumerate(batch))
        try:
            await worker.ready()
            start = time.perf_counter()
            async for judgements in worker.stream(worker.generation, "judge", _answers(batch)):
                for judgement in judgements:
                    _settle(left.pop(judgement.number), judgement.result, judgement.failure)
                    worker.num_answers -= 1
            self._seconds = (self._seconds + (time.perf_counter() - start) / len(batch)) / 2
        except EnvironmentFailureError as error:
            self._blame(error, list(left.values()))
        except Exception as error:  # such as a prompt that cannot be sent
            self._blame(EnvironmentFailureError(f"{type(error).__name__}: {error}"), list(left.values()))
        finally:
            worker.num_answers -= len(left)
            self._deal_soon()

    def _blame(self, error: EnvironmentFailureError, left: list[_Waiting]) -> None:
        """Tell the one answer whose failure it is; the others are judged again."""
        ended = isinstance(error, ProcessEndedError)
        if ended and self._max_concurrency > 1:
            for number, waiting in enumerate(left):
                blameless = error.blameless or number > 0
                _fail(waiting, ProcessEndedError(str(error), blameless=blameless))
        elif len(left) > 1:
            for waiting in reversed(left):
                waiting.alone = True
                self._waiting.appendleft(waiting)
        elif left:
            if ended:
                self._suspects.add(_key(left[0].prompt, left[0].sampled))
            _fail(left[0], error)


def _answers(batch: list[_Waiting]) -> Answers:
    numbers: dict[int, int] = {}
    prompts: list[Prompt] = []
    for waiting in batch:
        if numbers.setdefault(id(waiting.prompt), len(prompts)) == len(prompts):
            prompts.append(waiting.prompt)
    offsets = np.zeros(len(batch) + 1, np.int64)
    np.cumsum([len(waiting.sampled) for waiting in batch], out=offsets[1:])
    rows = [numbers[id(waiting.prompt)] for waiting in batch]
    return Answers(prompts, rows, np.concatenate([waiting.sampled for waiting in batch]), offsets)


def _settle(waiting: _Waiting, result: bytes, failure: str) -> None:
    from ray import cloudpickle

    if failure:
        _fail(waiting, EnvironmentFailureError(failure))
        return
    try:
        value = cloudpickle.loads(result)
    except Exception as error:  # what the environment returned cannot be read here
        _fail(waiting, EnvironmentFailureError(f"{type(error).__name__}: {error}"))
        return
    if not waiting.result.done():
        waiting.result.set_result(value)


def _fail(waiting: _Waiting, error: EnvironmentFailureError) -> None:
    if not waiting.result.done():
        waiting.result.set_exception(error)


def _key(prompt: Prompt, sampled: TokenIds) -> tuple[int, bytes]:
    return prompt.index, sampled.tobytes()
