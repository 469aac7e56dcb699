"""Measure the cost of rank 0's rollout path: requests, routing, episodes, grading, samples, without a model.

128 stand-in engines answer every request at once with random tokens; a worker process decodes each answer and
grades it by its length. The figures are of the driver's process: its throughput if engines and workers keep
up. ``engines`` says where the stand-ins are:

- ``driver``: in this process, as objects of the engine's protocol. Their own cost (copying random tokens) is
  included in the figures.
- ``ray``: in one Ray actor, behind the sessions of real engines, so requests and answers cross processes in
the same
  way.

Core seconds are CPU time of the driver's process, all its threads; ``seconds`` is wall time, in which engines
and workers share the cores with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Row
from megarl.cluster.ray_runtime import start_ray, stop_ray
from megarl.config.data import JsonlSource
from megarl.config.environments import CustomEnvironmentConfig, EnvironmentRuntime
from megarl.config.rollout import EngineConfig
from megarl.data.tokenizer import TurnReader
from megarl.environments.base import Verifier
from megarl.environments.remote import EnvironmentWorkers
from megarl.inference.actor.session import ActorSession
from megarl.inference.engine_group import EngineGroup
from megarl.inference.interface import GeneratedResponse, GenerateRequest, SamplingConfig
from megarl.metrics.timers import PhaseTimers
from megarl.records import Group, Prompt, token_ids
from megarl.sampling.rollout_manager import RolloutManager

NUM_ENGINES = 128
VOCABULARY = 50_000
PROMPT_TOKENS = 64
STOP = 0
GENERATIONS = 16
MAX_MODEL_LEN = 1 << 15
# Tokens per answer and prompts per step: quick, and full.
CASES = {"short": (16, 256, 1024), "long": (4096, 32, 256)}


class Length(Verifier):
    """Reward even lengths."""

    async def judge(self, prompt: Prompt, response_text: str) -> tuple[float, dict[str, Any]]:
        """See Verifier."""
        return float(len(response_text) % 2 == 0), {}


class RandomTokens:
    """Answers of one length, cut out of a pool of random tokens."""

    def __init__(self, length: int) -> None:
        draw = np.random.default_rng(0)
        self._length, self._place = length, 0
        self._ids = draw.integers(1, VOCABULARY, 1 << 18).astype(np.int32)
        self._logprobs = -draw.random(1 << 18, np.float32)

    def __call__(self, request: GenerateRequest) -> GeneratedResponse:
        """Return the next answer."""
        start = self._place
        end = start + self._length
        self._place = (start + 1) % (len(self._ids) - self._length)
        ids, logprobs = self._ids[start:end].copy(), self._logprobs[start:end].copy()
        return GeneratedResponse(request.request_id, ids, logprobs, "length", 0)


class StandIn:
    """The part of :class:`megarl.inference.interface.Engine` that a rollout needs."""

    config = EngineConfig(data_parallel_size=NUM_ENGINES)
    max_model_len = MAX_MODEL_LEN

    def __init__(self, answer: RandomTokens) -> None:
        self._answer = answer

    def session(self, sampling: SamplingConfig) -> StandInSession:
        """See Engine.session."""
        return StandInSession(self._answer)


class StandInSession:
    """An :class:`megarl.inference.interface.EngineSession`."""

    def __init__(self, answer: RandomTokens) -> None:
        self._answer = answer
        self._answers: asyncio.Queue[list[GeneratedResponse] | None] = asyncio.Queue()

    def submit(self, requests: Sequence[GenerateRequest]) -> None:
        """See EngineSession.submit."""
        self._answers.put_nowait([self._answer(request) for request in requests])

    async def __aiter__(self) -> AsyncIterator[list[GeneratedResponse]]:
        while (answers := await self._answers.get()) is not None:
            yield answers

    def close(self) -> None:
        """See EngineSession.close."""
        self._answers.put_nowait(None)


class StandInActor:
    """All stand-ins in one process, with the methods of an engine's actor that sessions call."""

    def __init__(self, length: int) -> None:
        self._answer = RandomTokens(length)
        self._sessions: dict[str, queue.SimpleQueue[list[GeneratedResponse] | None]] = {}

    def submit(self, session: str, requests: list[GenerateRequest], sampling: SamplingConfig) -> None:
        """See EngineActor.submit."""
        self._session(session).put([self._answer(request) for request in requests])

    def stream(self, session: str) -> Iterator[list[GeneratedResponse]]:
        """See EngineActor.stream."""
        while (answers := self._session(session).get()) is not None:
            yield answers

    def end_session(self, session: str) -> None:
        """See EngineActor.end_session."""
        self._session(session).put(None)

    def _session(self, session: str) -> queue.SimpleQueue[list[GeneratedResponse] | None]:
        return self._sessions.setdefault(session, queue.SimpleQueue())


class RemoteStandIn:
    """One of the actor's engines, behind a real engine's session."""

    config = StandIn.config
    max_model_len = MAX_MODEL_LEN

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def answered(self) -> None:
        """See EngineProcess.answered."""

    def session(self, sampling: SamplingConfig) -> ActorSession:
        """See Engine.session."""
        process: Any = self
        return ActorSession(process, sampling, MAX_MODEL_LEN)


def make_tokenizer(directory: Path) -> Any:
    """Build a byte-level BPE tokenizer of VOCABULARY tokens with the lengths of English ones."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    draw = np.random.default_rng(1)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = {"<eos>": 0}
    while len(words) < VOCABULARY:
        space = "\u0120" if draw.random() < 0.6 else ""  # a space in byte-level vocabularies
        words.setdefault(space + "".join(draw.choice(letters, draw.integers(1, 8))), len(words))
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    made.save_pretrained(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def make_prompts(count: int) -> list[Prompt]:
    """Return prompts of PROMPT_TOKENS random tokens."""
    draw = np.random.default_rng(2)
    ids = draw.integers(1, VOCABULARY, (count, PROMPT_TOKENS))
    return [Prompt(i, f"prompt {i}", token_ids(ids[i]), {"answer": str(i)}) for i in range(count)]


def run_case(case: str, engines: str, environment: Any, tokenizer: Any, *, quick: bool, repeats: int) -> Row:
    """Return the fastest of several steps, after a warm-up step."""
    length, few, many = CASES[case]
    prompts = make_prompts(few if quick else many)
    if engines == "driver":
        members: list[Any] = [StandIn(RandomTokens(length)) for _ in range(NUM_ENGINES)]
        actor = None
    else:
        import ray

        actor_class: Any = ray.remote(StandInActor)
        actor = actor_class.options(
            num_cpus=0, max_concurrency=NUM_ENGINES + 8, enable_task_events=False
        ).remote(length)
        members = [RemoteStandIn(actor) for _ in range(NUM_ENGINES)]
    rollouts = RolloutManager(EngineGroup(members), environment, tokenizer, (STOP,), PhaseTimers(), 1)
    steps: list[tuple[float, float]] = []
    for step in range(repeats + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        groups = rollouts.sample(
            prompts, step=step, generations=GENERATIONS, temperature=1.0, max_new_tokens=length
        )
        steps.append((time.process_time() - cpu, time.perf_counter() - wall))
        check(groups, len(prompts), length)
    if actor is not None:
        ray.kill(actor)
    core_seconds, seconds = min(steps[1:])
    samples = len(prompts) * GENERATIONS
    return {
        "case": case,
        "engines": engines,
        "response_tokens": length,
        "samples": samples,
        "core_seconds": core_seconds,
        "seconds": seconds,
        "samples_per_core_second": samples / core_seconds,
        "tokens_per_core_second": samples * length / core_seconds,
        "samples_per_second": samples / seconds,
    }


def check(groups: list[Group], prompts: int, length: int) -> None:
    """Assert that all samples are present, complete and graded."""
    assert [len(group.samples) for group in groups] == [GENERATIONS] * prompts
    for group in groups:
        for sample in group.samples:
            assert len(sample.response_ids) == len(sample.rollout_logprobs) == length
            assert sample.reward in (0.0, 1.0)


def main(argv: list[str]) -> None:
    """``python -m benchmarks driver --json FILE [--quick]``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks driver")
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="fewer samples, under 2 minutes")
    parser.add_argument("--profile", type=Path, help="cProfile's figures of the main thread, for pstats")
    args = parser.parse_args(argv)
    start_ray()
    with tempfile.TemporaryDirectory(prefix="megarl-bench-") as directory:
        tokenizer = make_tokenizer(Path(directory))
    source = JsonlSource(
        source="jsonl", path="unused", environment=CustomEnvironmentConfig(path="benchmarks.driver:Length")
    )
    workers = EnvironmentWorkers(source, "data.train", EnvironmentRuntime(), TurnReader(tokenizer, (STOP,)))
    environment = workers.wait_ready()

    def run() -> list[Row]:
        repeats = 2 if args.quick else 4
        return [
            run_case(case, engines, environment, tokenizer, quick=args.quick, repeats=repeats)
            for case in CASES
            for engines in ("driver", "ray")
        ]

    if args.profile is None:
        rows = run()
    else:
        import cProfile

        with cProfile.Profile() as profile:
            rows = run()
        profile.dump_stats(args.profile)
    workers.shutdown()
    stop_ray()
    for row in rows:
        print(
            f"{row['case']:6} {row['engines']:7} {row['samples']:6} samples of {row['response_tokens']:5}: "
            f"{row['core_seconds']:6.2f} s of a core, {row['seconds']:6.2f} s; "
            f"{row['samples_per_core_second']:9.0f} samples, {row['tokens_per_core_second']:11.0f} tokens "
            "per second of a core",
            file=sys.stderr,
        )
    found = {(row["case"], row["engines"]): row for row in rows}
    ratios = {
        "driver_tokens_per_second": found["long", "driver"]["tokens_per_core_second"],
        "driver_samples_per_second": found["short", "driver"]["samples_per_core_second"],
        "driver_tokens_per_second_ray": found["long", "ray"]["tokens_per_core_second"],
        "driver_samples_per_second_ray": found["short", "ray"]["samples_per_core_second"],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"rows": rows, "ratios": ratios}, indent=2) + "\n")
    print(json.dumps(ratios, indent=2))
