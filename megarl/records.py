"""Typed records that the stages of a step exchange (docs/architecture.md, "The step").

Shapes: T tokens, S sequences, G samples per group, N response tokens of one sample, P prompt tokens.
Per-token values are numpy arrays, which cross process boundaries (Ray, gloo) as one buffer each. Tensors
appear first in :class:`PackedBatch`, which never leaves a rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort"]
TokenIds = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]
NO_LOGPROBS: Logprobs = np.empty(0, np.float32)

NON_FINITE_WEIGHTS = "non_finite_weights"
"""Metric: the number of trained tensors with a NaN or an infinity after the step."""

# Fields of TokenSequence and TrainBatch with one value per token.
_PER_TOKEN: dict[str, type[np.generic]] = {
    "token_ids": np.int32,
    "loss_mask": np.uint8,
    "rollout_logprobs": np.float32,
    "stale": np.uint8,
    "experts": np.int16,
}


def token_ids(values: npt.ArrayLike) -> TokenIds:
    """Convert token ids to an int32 array; without a copy if they are one."""
    return np.asarray(values, dtype=np.int32)


class ArrayRecord:
    """Base of dataclasses with array fields, declared with ``eq=False``; equal if all compared fields are.

    The generated comparison of dataclasses would take the truth value of an array.
    """

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(
            _same(getattr(self, f.name), getattr(other, f.name))
            for f in fields(self)  # type: ignore[arg-type]
            if f.compare
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


@dataclass(frozen=True, slots=True, eq=False)
class Prompt(ArrayRecord):
    """A tokenised prompt; its text is never tokenised again.

    ``index`` is the position in its dataset: (dataset seed, index) identifies a prompt across runs.
    ``metadata`` is what the environment needs to score a response (the reference answer, the reasoning-gym
    entry, ...); it is not sent to the engine.
    """

    index: int
    text: str
    token_ids: TokenIds  # [P] int32
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of an episode: sampled tokens, then the tokens of the environment's observation."""

    num_sampled: int
    num_observed: int  # 0 after the last turn
    reward: float  # of this turn


@dataclass(slots=True, eq=False)
class Sample(ArrayRecord):
    """A sample of the policy: a prompt and the engine's response.

    ``prompt_ids`` is the array of the prompt, shared by its group. ``rollout_logprobs`` are the engine's,
    after temperature, for exactly the tokens in ``response_ids`` (including the stop token if the engine
    emitted it); empty if not requested. ``reward`` and ``advantage`` are None until computed.

    In a multi-turn episode ``response_ids`` holds everything after the prompt, in order: the sampled tokens,
    unchanged, and the observations between them, which have rollout_logprobs 0 and are not targets. ``turns``
    gives the lengths; if empty, the whole response was sampled in one turn.

    ``policy_version`` is that of the first token. If the weights changed during generation, ``version_spans``
    lists (policy version, number of response tokens) in order; if empty, all tokens have one version.
    """

    prompt_index: int
    prompt_ids: TokenIds  # [P] int32
    response_ids: TokenIds  # [N] int32
    rollout_logprobs: Logprobs  # [N] float32, or [0]
    policy_version: int
    finish_reason: FinishReason
    text: str | None = None  # decoded on demand (RolloutManager.read)
    reward: float | None = None
    advantage: float | None = None
    info: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    experts: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Expert choices of the engine, for every token but the last: [P + N - 1, MoE layers, k] int16."""
    version_spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Number of prompt and response tokens, P + N."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_sampled_tokens(self) -> int:
        """Number of response tokens sampled by the policy, which are the targets."""
        return sum(turn.num_sampled for turn in self.turns) if self.turns else len(self.response_ids)


def merge_spans(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge neighbouring (version, count) spans of equal version; return [] if only one version remains."""
    merged: list[tuple[int, int]] = []
    for version, count in spans:
        if merged and merged[-1][0] == version:
            merged[-1] = (version, merged[-1][1] + count)
        elif count:
            merged.append((version, count))
    return merged if len(merged) > 1 else []


@dataclass(slots=True)
class Group:
    """The G samples of one prompt, and the graded greedy response to it where one was asked for."""

    prompt: Prompt
    samples: list[Sample]  # [G]
    greedy: Sample | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence(ArrayRecord):
    """One training sequence of n tokens: a tokenised example, or a row of a TrainBatch.

    Per-token fields are aligned as in :class:`TrainBatch`; array-likes are converted to arrays.
    """

    token_ids: np.ndarray  # [n] int32
    loss_mask: np.ndarray  # [n] uint8
    rollout_logprobs: np.ndarray | None = None  # [n] float32
    num_prompt_tokens: int = 0  # leading tokens without targets, which neighbours may share
    experts: np.ndarray | None = field(default=None, repr=False)  # [n, MoE layers, k] int16
    stale: np.ndarray | None = None  # [n] uint8

    def __post_init__(self) -> None:
        for name, dtype in _PER_TOKEN.items():
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.asarray(values, dtype=dtype))
                assert len(values) == len(self), f"{len(values)} {name}, {len(self)} token_ids"

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference pair: a chosen and a rejected response to one prompt.

    The first ``num_prompt_tokens`` token ids of both sequences are the prompt and are equal.
    """

    chosen: TokenSequence
    rejected: TokenSequence
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatch:
    """The S training sequences of an optimizer step: T tokens in ragged arrays, in host memory.

    Worked example, sequences [a b c] and [a b d e] with targets c, d and e::

        token_ids         a  b  c  a  b  d  e
        offsets           0  3  7                  sequence s holds tokens offsets[s] to offsets[s + 1]
        loss_mask         0  0  1  0  0  1  1      1: the token is a *target*
        prompt_lengths    2  2                     [a b], the shared prompt
        rollout_logprobs  .  .  x  .  .  y  z      of targets; other values are not read

    Every per-token field is aligned with ``token_ids``: the value at i belongs to the prediction of token i
    (in a :class:`PackedBatch` it is one to the left). The first token of a sequence is never a target,
    whatever its mask: nothing predicts it. Only ``experts`` belong to the token itself.

    SFT, preference pairs (chosen and rejected are neighbours), GRPO, PPO and distillation all train on this
    record. It takes 5 bytes per token, 10 with logprobs and staleness.
    """

    token_ids: np.ndarray  # [T] int32
    offsets: np.ndarray  # [S + 1] int64
    loss_mask: np.ndarray  # [T] uint8
    prompt_lengths: np.ndarray  # [S] int64: leading tokens without targets, which neighbours may share
    rollout_logprobs: np.ndarray | None = None  # [T] float32, the engine's
    stale: np.ndarray | None = None  # [T] uint8, 1: sampled by an older policy version than the trainer's
    experts: np.ndarray | None = None  # [T, MoE layers, k] int16, to replay; -1: the trainer chooses

    @classmethod
    def of(cls, sequences: Iterable[TokenSequence]) -> TrainBatch:
        """Concatenate sequences. An optional field exists if any sequence has it (others get 0 or -1)."""
        rows = list(sequences)
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])

        def joined(name: str) -> np.ndarray | None:
            given = [getattr(row, name) for row in rows]
            shape = next((values.shape[1:] for values in given if values is not None), None)
            if shape is None:
                return None
            whole = np.full((int(offsets[-1]), *shape), -1 if name == "experts" else 0, _PER_TOKEN[name])
            for values, start, stop in zip(given, offsets[:-1], offsets[1:], strict=True):
                if values is not None:
                    whole[start:stop] = values
            return whole

        fields_of = {name: joined(name) for name in _PER_TOKEN}
        for name in ("token_ids", "loss_mask"):
            if fields_of[name] is None:  # no sequences
                fields_of[name] = np.zeros(0, dtype=_PER_TOKEN[name])
        prompts = np.array([row.num_prompt_tokens for row in rows], dtype=np.int64)
        return cls(offsets=offsets, prompt_lengths=prompts, **fields_of)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Return S."""
        return len(self.prompt_lengths)

    def __getitem__(self, row: int) -> TokenSequence:
        """Return sequence ``row``, as views."""
        at = slice(self.offsets[row], self.offsets[row + 1])

        def part(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[at]

        return TokenSequence(
            self.token_ids[at],
            self.loss_mask[at],
            part(self.rollout_logprobs),
            int(self.prompt_lengths[row]),
            part(self.experts),
            part(self.stale),
        )

    def __iter__(self) -> Iterator[TokenSequence]:
        return (self[row] for row in range(len(self)))

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> np.ndarray:
        """[S] int64: number of tokens of each sequence."""
        return np.diff(self.offsets)

    def targets(self) -> np.ndarray:
        """Return [T] bool, true for targets."""
        found = self.loss_mask != 0
        found[self.offsets[:-1][self.lengths > 0]] = False
        return found

    def num_targets(self) -> np.ndarray:
        """Return [S] int64, the number of targets of each sequence."""
        counts = np.zeros(len(self), dtype=np.int64)
        for row, (start, stop) in enumerate(pairwise(self.offsets.tolist())):
            counts[row] = np.count_nonzero(self.loss_mask[start + 1 : stop])
        return counts

    def select(self, rows: np.ndarray | list[int]) -> TrainBatch:
        """Return a copy with sequences ``rows``, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        offsets = np.concatenate([[0], self.lengths[rows].cumsum()]).astype(np.int64)

        def chosen(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else take_rows(values, self.offsets, rows)

        return TrainBatch(
            take_rows(self.token_ids, self.offsets, rows),
            offsets,
            take_rows(self.loss_mask, self.offsets, rows),
            self.prompt_lengths[rows],
            chosen(self.rollout_logprobs),
            chosen(self.stale),
            chosen(self.experts),
        )


def take_rows(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Concatenate the ragged rows ``values[offsets[i] : offsets[i + 1]] for i in rows``."""
    starts, stops = offsets[rows].tolist(), offsets[rows + 1].tolist()
    if not starts:
        return values[:0]
    return np.concatenate([values[start:stop] for start, stop in zip(starts, stops, strict=True)])


@dataclass(slots=True)
class PackedBatch:
    """One microbatch in THD layout: concatenated sequences, without padding inside a sequence.

    Worked example, sequences [a b c] and [d e] with c and e as targets::

        token_ids     a  b  c  d  e
        labels        b  c  .  e  .      token t+1 of the same sequence; 0 where there is none
        loss_mask     0  1  0  1  0      1 where labels[t] is a target
        position_ids  0  1  2  0  1
        cu_seqlens    0  3  5
        sequence_ids  0  0  0  1  1      index into the caller's list of sequences
        lengths       3  2

    Every per-token field is aligned with ``labels``: the value at t belongs to the prediction
    that position t makes. Padding (to a multiple of 2 * context_parallel_size per split sequence)
    carries loss_mask 0.
    """

    token_ids: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64
    loss_mask: torch.Tensor  # [T] float32
    position_ids: torch.Tensor  # [T] int64
    cu_seqlens: torch.Tensor  # [S + 1] int32
    sequence_ids: torch.Tensor  # [T] int64
    advantages: torch.Tensor | None = None  # [T] float32
    rollout_logprobs: torch.Tensor | None = None  # [T] float32
    old_logprobs: torch.Tensor | None = None  # [T] float32
    ref_logprobs: torch.Tensor | None = None  # [T] float32
    old_values: torch.Tensor | None = None  # [T] float32, the critic's before the step's first update
    returns: torch.Tensor | None = None  # [T] float32, targets of the critic
    loss_weights: torch.Tensor | None = None  # [T] float32, weight of each token in the step's loss
    stale: torch.Tensor | None = None  # [T] float32, 1: sampled by an older policy version
    nll_weights: torch.Tensor | None = None  # [T] float32, weight of each token in the likelihood term
    lengths: torch.Tensor | None = None  # [S] int32, tokens without padding (dummy: 0); None: no padding
    prefixes: torch.Tensor | None = None  # [S] int64, the sequence that is this one's prefix, -1: none
    experts: torch.Tensor | None = None  # [T, MoE layers, k] int16, to replay for token t; -1: none
    token_share: float = 1.0  # of the step's tokens, without padding
    split: bool = True  # sequences are split over the context-parallel ranks; False: whole sequences

    @property
    def is_dummy(self) -> bool:
        """Whether it has no sequences: a placeholder on a rank with fewer microbatches than others."""
        return self.lengths is not None and not bool(self.lengths.any())


@dataclass(slots=True)
class StepMetrics:
    """Metrics of one step: ``values`` is one line of metrics.jsonl, in order."""

    step: int
    values: dict[str, float]
