"""The typed records in which the stages of a step meet (docs/architecture.md, "The step").

Shapes: T packed tokens, S sequences, G samples per group, N response tokens of one sample, P prompt
tokens. What there is one of per token is a numpy array, which crosses process boundaries (Ray, gloo) as one
buffer; tensors appear first in :class:`PackedBatch`, which never leaves a rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort"]
TokenIds = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]
NO_LOGPROBS: Logprobs = np.empty(0, np.float32)


def token_ids(values: npt.ArrayLike) -> TokenIds:
    """Token ids of any kind as an int32 array; without a copy where they are one."""
    return np.asarray(values, dtype=np.int32)


class ArrayRecord:
    """Base of dataclasses with array fields, made with ``eq=False``: equal where all compared fields are.

    The comparison that dataclasses write themselves asks an array whether it is true.
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
    """One problem, ready for the engine: text is tokenised once and never again.

    ``index`` is the position in its dataset: (dataset seed, index) names a problem for ever.
    ``metadata`` is what its environment needs to judge an answer (the reference answer, the
    reasoning-gym entry, ...); it never reaches the engine.
    """

    index: int
    text: str
    token_ids: TokenIds  # [P] int32
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of an episode: tokens the policy sampled, then those it read as the environment's answer."""

    num_sampled: int
    num_observed: int  # 0 after the last turn
    reward: float  # what the environment gave for this turn


@dataclass(slots=True, eq=False)
class Sample(ArrayRecord):
    """One sequence drawn from the policy: a prompt and the response the engine gave.

    ``prompt_ids`` is the prompt's own array, one for a group. ``rollout_logprobs`` are the engine's own,
    after temperature, of exactly the tokens in ``response_ids`` (the stop token included when the engine
    emitted it); empty where none were asked for. ``reward`` and ``advantage`` are None until their stage has
    run.

    An episode of several turns has everything after the prompt in ``response_ids``, in order: what was
    sampled, exactly as it was sampled, and the observations between, whose rollout_logprobs are 0 and which
    are no targets. ``turns`` says which is which; empty, all of the response was sampled in one turn.

    ``policy_version`` drew the first token. Where the weights changed in between, ``version_spans`` has
    (policy version, number of response tokens), in order; empty, one version drew them all.
    """

    prompt_index: int
    prompt_ids: TokenIds  # [P] int32
    response_ids: TokenIds  # [N] int32
    rollout_logprobs: Logprobs  # [N] float32, or [0]
    policy_version: int
    finish_reason: FinishReason
    text: str = ""  # the response, decoded for verifiers and people; never re-tokenised
    reward: float | None = None
    advantage: float | None = None
    info: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    experts: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Chosen by the engine for every token but the last: [P + N - 1, layers with experts, k] int16."""
    version_spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_sampled_tokens(self) -> int:
        """Response tokens that the policy sampled: the targets."""
        return sum(turn.num_sampled for turn in self.turns) if self.turns else len(self.response_ids)

    @property
    def token_versions(self) -> list[int]:
        """[N] the policy version that drew each response token (an observation's: of the turn before)."""
        spans = self.version_spans or [(self.policy_version, len(self.response_ids))]
        return [version for version, count in spans for _ in range(count)]

    @property
    def response_mask(self) -> list[int]:
        """[N] 1 where the token was sampled, 0 where it was observed."""
        if not self.turns:
            return [1] * len(self.response_ids)
        return [value for t in self.turns for value in [1] * t.num_sampled + [0] * t.num_observed]


def merge_spans(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(version, count) spans with equal neighbours as one; none where one version is all there is."""
    merged: list[tuple[int, int]] = []
    for version, count in spans:
        if merged and merged[-1][0] == version:
            merged[-1] = (version, merged[-1][1] + count)
        elif count:
            merged.append((version, count))
    return merged if len(merged) > 1 else []


@dataclass(slots=True)
class Group:
    """The G samples of one prompt."""

    prompt: Prompt
    samples: list[Sample]  # [G]


@dataclass(frozen=True, slots=True)
class Sequence:
    """One training sequence before packing: ids and which of them are learned from.

    ``loss_mask[i]`` is 1 where ``token_ids[i]`` is a *target* (a response token); position 0 can
    never be a target and its mask is ignored. Per-token fields are aligned with ``token_ids``
    (the value at i belongs to the prediction of token i), empty when the stage has no use for them.
    """

    token_ids: list[int]  # [n]
    loss_mask: list[int]  # [n], 0 or 1
    advantage: float = 0.0
    rollout_logprobs: list[float] = field(default_factory=list)  # [n] or empty
    num_prompt_tokens: int = 0  # leading tokens without a target that neighbours may have in common
    # Experts to replay, each token's own (not those of the prediction of it): [n, layers with experts, k]
    # int16, -1 where the trainer is to choose.
    experts: np.ndarray | None = field(default=None, repr=False, compare=False)
    stale: list[int] = field(default_factory=list)  # [n] or empty, 1: older weights drew it


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt, the first of which is preferred.

    The first ``num_prompt_tokens`` token ids of both sequences are the prompt, the same in both.
    """

    chosen: Sequence
    rejected: Sequence
    num_prompt_tokens: int


@dataclass(slots=True)
class PackedBatch:
    """One microbatch in THD layout: sequences end to end, no padding between tokens of one.

    Worked example, sequences [a b c] and [d e] with c and e as targets::

        token_ids     a  b  c  d  e
        labels        b  c  .  e  .      token t+1 of the same sequence; 0 where there is none
        loss_mask     0  1  0  1  0      1 where labels[t] is a target
        position_ids  0  1  2  0  1
        cu_seqlens    0  3  5
        sequence_ids  0  0  0  1  1      row of the caller's list of sequences
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
    old_values: torch.Tensor | None = None  # [T] float32, a critic's before the step's first update
    returns: torch.Tensor | None = None  # [T] float32, what the critic learns
    loss_weights: torch.Tensor | None = None  # [T] float32, the share of each token in the step's mean
    stale: torch.Tensor | None = None  # [T] float32, 1 where older weights than the trainer's drew the token
    nll_weights: torch.Tensor | None = None  # [T] float32, the same for a likelihood term
    lengths: torch.Tensor | None = None  # [S] int32, tokens without padding (dummy: 0); None: no padding
    prefixes: torch.Tensor | None = None  # [S] int64: the sequence of this batch that comes first, -1: none
    experts: torch.Tensor | None = None  # [T, layers, k] int16, to replay; of token t, -1: none given
    token_share: float = 1.0  # of the step's tokens, padding left out on both sides
    split: bool = True  # over the context-parallel ranks; False: this rank's own, whole sequences

    @property
    def is_dummy(self) -> bool:
        """Whether it has no sequence: it stands in where a rank has fewer microbatches than others."""
        return self.lengths is not None and not bool(self.lengths.any())


@dataclass(slots=True)
class StepMetrics:
    """What one step reports: ``values`` is one line of metrics.jsonl, in its order."""

    step: int
    values: dict[str, float]
