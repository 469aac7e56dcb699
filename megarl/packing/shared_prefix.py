"""The prompt of a group computed once: [prompt | response 1 | response 2 ...], each response attending to it.

A group's sequences become one *prefix*, the prompt without its last token, and *branches*, each of which
repeats that last token and goes on with its response. A branch therefore predicts every token of its
response from a position of its own, labels and per-token values stay aligned as in any packed sequence,
and only attention and positions need to know the prefix. Exact: a token attends to the same tokens at the
same positions as in the flat packing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megarl.packing.plan import CostModel, PackingPlan, plan_microbatches
from megarl.records import Sequence

MIN_SAVED_FRACTION = 0.1
"""Share of a group's tokens that must be saved: below, the mask costs more than the tokens would."""


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """What to pack in place of the step's sequences.

    ``origins[i]`` is the caller's sequence that ``sequences[i]`` is part of (a prefix: its first branch's);
    ``prefix_of[i]`` the number of its prefix in ``sequences``, -1 where it has none. ``units`` are the lists
    of sequences that must share a microbatch, in this order.
    """

    sequences: list[Sequence]
    origins: list[int]
    prefix_of: list[int]
    units: list[list[int]]


def share_prefixes(sequences: list[Sequence], *, max_tokens: int, pad_to_multiple: int) -> SharedPrefixes:
    """Find neighbours with equal prompts (``num_prompt_tokens``) and split them where that saves enough.

    A group that does not fit ``max_tokens`` together is cut, each part with a prefix of its own.
    """
    shared = SharedPrefixes([], [], [], [])
    for group in _groups(sequences):
        prompt = sequences[group[0]].num_prompt_tokens
        flat = sum(len(sequences[i].token_ids) for i in group)
        parts = [group]
        if prompt > 1:
            parts = _fitting(sequences, group, prompt, max_tokens, pad_to_multiple)
        for part in parts:
            saved = (len(part) - 1) * (prompt - 1)
            if prompt > 1 and len(part) > 1 and saved >= MIN_SAVED_FRACTION * flat * len(part) / len(group):
                _add_shared(shared, sequences, part, prompt)
            else:
                for i in part:
                    _add(shared, sequences[i], i, -1)
                    shared.units.append([len(shared.sequences) - 1])
    return shared


def plan_units(
    shared: SharedPrefixes,
    *,
    max_tokens: int,
    num_ranks: int,
    pad_to_multiple: int,
    costs: CostModel,
    microbatch_group_size: int,
) -> PackingPlan:
    """As plan_microbatches with equal counts; the sequences of a unit share a microbatch."""
    padded = [-(-len(s.token_ids) // pad_to_multiple) * pad_to_multiple for s in shared.sequences]
    totals = [sum(padded[i] for i in unit) for unit in shared.units]
    plan = plan_microbatches(
        totals,
        max_tokens=max_tokens,
        num_ranks=num_ranks,
        # Members of a unit attend to themselves and the prefix, not to each other.
        costs=CostModel(costs.a, costs.b * len(shared.units) / len(shared.sequences)),
        microbatch_group_size=microbatch_group_size,
    )
    members = [
        [[i for unit in microbatch for i in shared.units[unit]] for microbatch in rank]
        for rank in plan.microbatches
    ]
    return PackingPlan(members, plan.rank_costs, plan.num_tokens)


def _groups(sequences: list[Sequence]) -> Iterator[list[int]]:
    """Neighbours with the same prompt."""
    group: list[int] = []
    for i, sequence in enumerate(sequences):
        if group and _prompt(sequence) != _prompt(sequences[group[0]]):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _prompt(sequence: Sequence) -> list[int]:
    return sequence.token_ids[: sequence.num_prompt_tokens]


def _fitting(
    sequences: list[Sequence], group: list[int], prompt: int, max_tokens: int, multiple: int
) -> list[list[int]]:
    """Parts of the group that fit a microbatch with one prefix each."""

    def padded(length: int) -> int:
        return -(-length // multiple) * multiple

    parts: list[list[int]] = []
    used = max_tokens + 1
    for i in group:
        branch = padded(len(sequences[i].token_ids) - prompt + 1)
        if used + branch > max_tokens:
            parts.append([])
            used = padded(prompt - 1)
        parts[-1].append(i)
        used += branch
    return parts


def _add_shared(shared: SharedPrefixes, sequences: list[Sequence], part: list[int], prompt: int) -> None:
    first = sequences[part[0]]
    with_logprobs = bool(first.rollout_logprobs)
    prefix = Sequence(
        token_ids=first.token_ids[: prompt - 1],
        loss_mask=[0] * (prompt - 1),
        rollout_logprobs=[0.0] * (prompt - 1) if with_logprobs else [],
        num_prompt_tokens=prompt - 1,
        experts=first.experts[: prompt - 1] if first.experts is not None else None,
    )
    number = len(shared.sequences)
    _add(shared, prefix, part[0], -1)
    for i in part:
        whole = sequences[i]
        assert not any(whole.loss_mask[1:prompt]), f"sequence {i}: a target in its prompt"
        branch = replace(
            whole,
            token_ids=whole.token_ids[prompt - 1 :],
            loss_mask=[0, *whole.loss_mask[prompt:]],
            rollout_logprobs=whole.rollout_logprobs[prompt - 1 :],
            num_prompt_tokens=1,
            experts=whole.experts[prompt - 1 :] if whole.experts is not None else None,
        )
        _add(shared, branch, i, number)
    shared.units.append(list(range(number, len(shared.sequences))))


def _add(shared: SharedPrefixes, sequence: Sequence, origin: int, prefix: int) -> None:
    shared.sequences.append(sequence)
    shared.origins.append(origin)
    shared.prefix_of.append(prefix)
