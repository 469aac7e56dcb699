"""Continuous batching: which requests are decoded in the next step, and what becomes of what they draw.

A request starts as soon as there is a slot, tokens and memory for it, in the order in which they came; it
leaves with its last token, and nobody waits for the longest. Where memory runs out, the youngest gives its
own back and is computed again later: its noise is that of its positions, so that it draws what it would have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch

from megarl.inference.hf.runner import Decoding, Runner
from megarl.inference.hf.sampler import draw, uniforms
from megarl.inference.interface import GeneratedResponse, GenerateRequest, SamplingConfig


class Scheduler:
    """Requests in, responses out, a step at a time. On one thread.

    Args:
        runner: the model with its memory.
        max_num_seqs: requests decoded side by side.
        max_tokens: of prompts computed in one step; a longer one is computed alone.
        max_model_len: most tokens of prompt and response together.
        share_prompts: whether equal prompts that start together are computed once.
        seed: for requests that bring none.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_num_seqs: int,
        max_tokens: int,
        max_model_len: int,
        share_prompts: bool,
        seed: int,
    ) -> None:
        self.runner, self._max_model_len, self._seed = runner, max_model_len, seed
        self._max_num_seqs, self._max_tokens, self._share_prompts = max_num_seqs, max_tokens, share_prompts
        self._waiting: deque[Decoding] = deque()
        self._running: list[Decoding] = []
        self.policy_version = 0
        """Of the weights that draw from now on."""

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, requests: Iterable[GenerateRequest], sampling: SamplingConfig) -> None:
        """Have them sampled. Ids of unfinished requests must differ."""
        for request in requests:
            seed = request.seed
            if seed is None:
                self._seed += 1
                seed = self._seed
            tokens = request.prompt_ids.tolist()
            limit = min(len(tokens) + request.max_new_tokens, self._max_model_len)
            self._waiting.append(Decoding(request, sampling, seed, tokens, limit))

    @torch.inference_mode()
    def step(self) -> list[GeneratedResponse]:
        """Draw the next token of as many requests as there is room for; those that finished."""
        decoded = self._keep_running()
        started, followers = self._start()
        logits = self.runner.compute(decoded, started)
        rows = list(range(len(decoded) + len(started)))
        later = []
        for one, leader in followers:  # the leader's prompt is computed now
            if self.runner.share(one, started[leader]):
                rows.append(len(decoded) + leader)
                started.append(one)
            else:
                later.append(one)
        self._waiting.extendleft(reversed(later))
        self._running = [*decoded, *started]
        return self._draw(self._running, logits, rows)

    def abort(self, request_ids: Iterable[str]) -> list[GeneratedResponse]:
        """End these; what they have so far."""
        wanted = set(request_ids)
        running = [one for one in self._running if one.request.request_id in wanted]
        waiting = [one for one in self._waiting if one.request.request_id in wanted]
        self._running = [one for one in self._running if one.request.request_id not in wanted]
        self._waiting = deque(one for one in self._waiting if one.request.request_id not in wanted)
        self.runner.release(running, keep=True)
        return [one.response("abort", self.policy_version) for one in (*running, *waiting)]

    def forget(self) -> None:
        """Give up all keys and values; running requests are computed again, and go on with their tokens."""
        self._wait_again(self._running)
        self._running = []
        self.runner.clear()

    def _keep_running(self) -> list[Decoding]:
        """The running requests that have memory for their newest token; the youngest make room."""
        kept = self._running
        for number, one in enumerate(self._running):
            if number >= len(kept):
                break
            while not self.runner.extend(one):
                assert len(kept) > 1, "memory for less than one request"
                self._wait_again(kept[-1:])
                kept = kept[:-1]
                if one not in kept:
                    break
        return kept

    def _wait_again(self, those: Sequence[Decoding]) -> None:
        self.runner.release(those, keep=False)
        self._waiting.extendleft(reversed(those))

    def _start(self) -> tuple[list[Decoding], list[tuple[Decoding, int]]]:
        """Return the requests that start, and those that will copy keys and values of one of them."""
        started: list[Decoding] = []
        followers: list[tuple[Decoding, int]] = []
        leaders: dict[tuple[int, ...], int] = {}
        tokens = 0
        while self._waiting and len(self._running) + len(started) + len(followers) < self._max_num_seqs:
            one = self._waiting[0]
            key = tuple(one.tokens)
            if self._share_prompts and key in leaders:
                followers.append((self._waiting.popleft(), leaders[key]))
                continue
            if started and tokens + len(one.tokens) > self._max_tokens:
                break
            if not self.runner.admit(one):
                break
            tokens += len(one.tokens) - one.cached
            leaders[key] = len(started)
            started.append(self._waiting.popleft())
        return started, followers

    def _draw(self, those: list[Decoding], logits: torch.Tensor, rows: list[int]) -> list[GeneratedResponse]:
        """The next token of each, from its row of the logits."""
        kinds: dict[SamplingConfig, list[int]] = {}
        for number, one in enumerate(those):
            kinds.setdefault(one.sampling, []).append(number)
        for sampling, numbers in kinds.items():
            mine = [those[number] for number in numbers]
            noise = uniforms([one.seed for one in mine], [one.num_drawn for one in mine])
            wanted = [rows[number] for number in numbers]
            picked = logits if wanted == list(range(len(logits))) else logits[wanted]
            tokens, logprobs = draw(picked, sampling, noise)
            for one, token, logprob in zip(mine, tokens.tolist(), logprobs.tolist(), strict=True):
                one.take(token, logprob, self.policy_version)
        reasons = [one.finish_reason() for one in those]
        finished = [one for one, reason in zip(those, reasons, strict=True) if reason]
        self._running = [one for one, reason in zip(those, reasons, strict=True) if not reason]
        self.runner.release(finished, keep=True)
        return [
            one.response(reason, self.policy_version)
            for one, reason in zip(those, reasons, strict=True)
            if reason
        ]
