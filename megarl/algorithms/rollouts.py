"""Prompts in, graded groups out: the engine and the environment side by side.

Responses are decoded and graded as they finish, while the engine works on the rest.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarl.environments.base import Environment, grade
from megarl.metrics.timers import Phase, PhaseTimers
from megarl.platform import ranges
from megarl.records import Group, Prompt, Sample
from megarl.rollout.engine import Engine, GenerateRequest, SamplingConfig


def request_seed(run_seed: int, step: int, prompt_index: int, generation: int) -> int:
    """The sampling seed of one sample: a pure function, so that a resumed run draws the same tokens."""
    name = f"{run_seed}/{step}/{prompt_index}/{generation}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1


class Rollouts:
    """Samples groups with one engine and grades them with one environment (rank 0 only)."""

    def __init__(
        self,
        engine: Engine,
        environment: Environment,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: tuple[int, ...],
        timers: PhaseTimers,
        run_seed: int,
    ) -> None:
        self._engine, self._environment, self._tokenizer = engine, environment, tokenizer
        self._stop_token_ids, self._timers, self._run_seed = stop_token_ids, timers, run_seed

    def sample(
        self,
        prompts: list[Prompt],
        *,
        step: int,
        generations: int,
        temperature: float,
        max_new_tokens: int,
        top_k: int = 0,
        top_p: float = 1.0,
        advance: Callable[[int], None] = lambda _: None,
        phase: Phase = "rollout",
    ) -> list[Group]:
        """One group of ``generations`` samples per prompt, in the order of ``prompts``.

        All requests are batched continuously; ``advance(1)`` is called for each finished sample.
        Temperature 0 is greedy and carries no logprobs.
        Time is booked under ``phase``, and grading a training rollout under "reward".
        """
        greedy = temperature == 0
        requests = [
            GenerateRequest(
                f"{step}-{p}-{g}",
                prompt.token_ids,
                max_new_tokens,
                None if greedy else request_seed(self._run_seed, step, prompt.index, g * len(prompts) + p),
            )
            for p, prompt in enumerate(prompts)
            for g in range(generations)
        ]
        sampling = SamplingConfig(
            temperature, self._stop_token_ids, logprobs=not greedy, top_k=top_k, top_p=top_p
        )
        samples: dict[str, Sample] = {}
        with self._timers(phase):
            for response in self._engine.generate(requests, sampling):
                _, p, _ = response.request_id.split("-")
                prompt = prompts[int(p)]
                text = self._tokenizer.decode(response.token_ids, skip_special_tokens=True)
                with self._timers("reward" if phase == "rollout" else phase):
                    reward, info = asyncio.run(grade(self._environment, prompt, text))
                samples[response.request_id] = Sample(
                    prompt.index,
                    prompt.token_ids,
                    response.token_ids,
                    response.logprobs,
                    response.policy_version,
                    response.finish_reason,
                    text,
                    reward,
                    info=info,
                )
                advance(1)
                ranges.tick()
        return [
            Group(prompt, [samples[f"{step}-{p}-{g}"] for g in range(generations)])
            for p, prompt in enumerate(prompts)
        ]


def sample_row(step: int, group: Group, sample: Sample) -> dict[str, Any]:
    """What samples/step_N.jsonl says of any sample, trained on or evaluated."""
    return {
        "step": step,
        "prompt_index": sample.prompt_index,
        "prompt": group.prompt.text,
        "response": sample.text,
        "answer": group.prompt.metadata.get("answer"),
        "reward": sample.reward,
        "finish_reason": sample.finish_reason,
    }
