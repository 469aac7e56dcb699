"""Rank 0 plans a step and scatters shares: equal to packing on ranks that have all the data."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch

from megarl.batching.microbatch_plan import CostModel
from megarl.config.packing import PackingConfig
from megarl.errors import UserError
from megarl.losses.base import token_weights
from megarl.records import PackedBatch, TokenSequence, TrainBatch
from tests.trainer.world import world

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pp2-dp2": (4, {"pipeline_parallel_size": 2}),
    "cp2-dp2": (4, {"context_parallel_size": 2}),
    "cp2-whole-dp2": (4, {"context_parallel_size": 2, "context_split_from": 40}),
    "tp2-cp2-whole": (4, {"tensor_parallel_size": 2, "context_parallel_size": 2, "context_split_from": 40}),
}


def make_batch(seed: int = 0, groups: int = 6, size: int = 4) -> TrainBatch:
    """Groups with a shared prompt, expert choices for some, tokens of older weights."""
    draw = random.Random(seed)
    rows = []
    for _ in range(groups):
        prompt = [draw.randrange(250) for _ in range(draw.randint(3, 30))]
        for number in range(size):
            response = [draw.randrange(250) for _ in range(draw.randint(1, 50))]
            n = len(prompt) + len(response)
            mask = [0] * len(prompt) + [int(draw.random() < 0.8) for _ in response]
            experts = np.array([draw.randrange(4) for _ in range(2 * n)]).reshape(n, 2, 1)
            rows.append(
                TokenSequence(
                    np.array(prompt + response),
                    np.array(mask),
                    np.array([draw.uniform(-5, 0) for _ in range(n)]),
                    len(prompt),
                    experts.astype(np.int16) if number else None,
                    np.array([draw.randint(0, 1) for _ in range(n)]),
                )
            )
    return TrainBatch.of(rows)


def maker_of(context: Any, budget: int = 256) -> Any:
    from megarl.batching.rank_microbatches import BatchMaker

    packing = PackingConfig(max_tokens_per_microbatch=budget)
    split_from = context.parallel.context_split_from
    return BatchMaker(context.layout, context.rank, "cpu", packing, CostModel(), split_from)


def assert_same(one: PackedBatch, other: PackedBatch) -> None:
    for field in dataclasses.fields(PackedBatch):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, field.name
        else:
            assert ours == theirs, field.name


def both_ways(context: Any) -> dict[str, Any]:
    """The step scattered from rank 0, and packed from data of every rank; values scattered and gathered."""
    import torch.distributed as dist

    from megarl.batching.rank_microbatches import gather_from_packed, reweight, scatter_to_packed

    maker, whole = maker_of(context), make_batch()
    advantages = np.array([random.Random(i).gauss(0, 1) for i in range(len(whole))])
    only = np.delete(np.arange(len(whole)), [3, 8, 9])
    options: dict[str, Any] = {"only": only, "advantages": advantages}
    sent, real = [], dist.send

    def send(tensor: torch.Tensor, dst: int, **more: Any) -> None:
        sent.append((dst, tensor.nbytes))
        real(tensor, dst=dst, **more)

    dist.send = send  # type: ignore[assignment]
    try:
        given = whole if context.is_first else None
        scattered = maker.prepare(given, "token", scatter=True, **options)
    finally:
        dist.send = real
    selected = maker.prepare(whole, "token", **options)
    assert len(scattered.batches) == len(selected.batches) > 0
    for ours, theirs in zip(scattered.batches, selected.batches, strict=True):
        assert_same(ours, theirs)
    assert (scattered.batch is None) == (not context.is_first)
    assert np.array_equal(scattered.rows, selected.rows)
    assert scattered.split_counts == selected.split_counts

    # A value for each token, and one for each sequence, to the targets and back.
    values = np.random.RandomState(1).randn(whole.num_tokens)
    fields = scatter_to_packed(scattered, values if context.is_first else None)
    by_batch = {id(batch): field for batch, field in zip(scattered.batches, fields, strict=True)}
    back = gather_from_packed(scattered, lambda batch: by_batch[id(batch)])
    weights = gather_from_packed(
        scattered, lambda batch: torch.zeros(0) if batch.loss_weights is None else batch.loss_weights
    )
    stale = gather_from_packed(
        scattered, lambda batch: torch.zeros(0) if batch.stale is None else batch.stale
    )

    # Two sequences out of the loss.
    counts = whole.num_targets()
    counts[[0, 5]] = 0
    reweight(scattered, counts if context.is_first else np.zeros(0), "token")
    kept = gather_from_packed(scattered, lambda batch: batch.loss_mask)
    dropped = gather_from_packed(
        scattered, lambda batch: torch.zeros(0) if batch.loss_weights is None else batch.loss_weights
    )
    at = context.at
    return {
        "rows": scattered.rows.tolist(),
        "at": (at.data, at.context, at.tensor, at.pipeline),
        "sent": sent,
        "bytes_sent": scattered.bytes_sent,
        "split_counts": scattered.split_counts,
        "figures": (scattered.num_tokens, scattered.num_computed_tokens),
        "back": back,
        "weights": weights,
        "stale": stale,
        "kept": kept,
        "dropped": dropped,
        "values": values,
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_gets_the_share_it_would_have_chosen(name: str) -> None:
    size, parallel = LAYOUTS[name]
    ranks = world(size).run(both_ways, parallel=parallel)
    batch, first = make_batch(), ranks[0]
    packed = np.delete(np.arange(len(batch)), [3, 8, 9])
    # Every sequence is somewhere; ranks of one (data, context) coordinate have the same.
    assert sorted({row for rank in ranks for row in rank["rows"]}) == packed.tolist()
    by_place: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for rank in ranks:
        by_place.setdefault(rank["at"][:2], set()).add(tuple(rank["rows"]))
    assert all(len(shares) == 1 for shares in by_place.values())
    if size > 1 and name != "tp2":
        assert all(0 < len(rank["rows"]) < len(packed) for rank in ranks), "no rank has all"
    assert {rank["figures"] for rank in ranks} == {first["figures"]}
    assert first["figures"][0] == batch.lengths[packed].sum() > first["figures"][1] - 200
    if "whole" in name:
        assert sum(first["split_counts"].values()) == len(packed) and min(first["split_counts"].values()) > 0
    else:
        assert first["split_counts"] == {}

    targets = batch.targets() & np.isin(np.repeat(np.arange(len(batch)), batch.lengths), packed)
    assert np.array_equal(first["back"], np.where(targets, first["values"].astype(np.float32), 0))
    weight = np.float32(token_weights(batch.num_targets(), "token"))
    of_tokens = np.repeat(weight, batch.lengths)
    assert np.array_equal(first["weights"], np.where(targets, of_tokens, 0))
    assert batch.stale is not None
    assert np.array_equal(first["stale"], np.where(targets, batch.stale, 0))
    left = targets & ~np.isin(np.repeat(np.arange(len(batch)), batch.lengths), [0, 5])
    assert np.array_equal(first["kept"], left)
    total = batch.num_targets()[[i for i in range(len(batch)) if i not in (0, 5)]].sum()
    assert np.array_equal(first["dropped"], np.where(left, np.float32(1 / total), 0))
    for rank in ranks[1:]:
        assert all(len(rank[key]) == 0 for key in ("back", "weights", "kept"))


@pytest.mark.parametrize("name", ["dp2", "pp2-dp2", "cp2-dp2"])
def test_what_is_sent_is_what_the_shares_hold(name: str) -> None:
    """Rank 0 sends each coordinate its sequences' arrays once, and a plan that is small in comparison."""
    size, parallel = LAYOUTS[name]
    ranks = world(size).run(both_ways, parallel=parallel)
    batch = make_batch()
    token_bytes = 4 + 1 + 4 + 1 + 2 * 2  # ids, mask, logprobs, staleness, choices
    leaders = {rank["at"][:2]: rank["rows"] for rank in reversed(ranks)}
    expected = sum(
        token_bytes * int(batch.lengths[rows].sum()) for place, rows in leaders.items() if place != (0, 0)
    )
    assert expected <= ranks[0]["bytes_sent"] <= expected + 3000, "the plan of some twenty sequences"
    wire = sum(size for _, size in ranks[0]["sent"])
    peers = size // len(leaders)  # of rank 0's own coordinate
    own = token_bytes * int(batch.lengths[leaders[0, 0]].sum())
    assert ranks[0]["bytes_sent"] <= wire - (peers - 1) * own <= ranks[0]["bytes_sent"] + 1500 * size
    assert len({dst for dst, _ in ranks[0]["sent"]}) == len(leaders) - 1 + peers - 1


def refuse(context: Any) -> str:
    try:
        maker_of(context, budget=40).prepare(
            make_batch() if context.is_first else None, "token", scatter=True
        )
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_sequence_that_does_not_fit_ends_every_rank() -> None:
    first, other = world(2).run(refuse)
    assert "max_tokens_per_microbatch = 40" in first and first.startswith("UserError")
    assert "max_tokens_per_microbatch = 40" in other and other.startswith("ToldByRankZeroError")


def few(context: Any) -> tuple[int, list[bool], float]:
    """A step of one sequence on more ranks, and a step without a packed target."""
    from megarl.batching.rank_microbatches import gather_from_packed

    lone = TrainBatch.of([TokenSequence(np.arange(9), np.arange(9) > 3)])
    step = maker_of(context).prepare(lone if context.is_first else None, "sequence", scatter=True)
    whole = gather_from_packed(step, lambda batch: batch.loss_mask)
    return len(step.rows), [batch.is_dummy for batch in step.batches], float(whole.sum())


def test_ranks_without_a_sequence_have_a_dummy() -> None:
    results = world(4).run(few)
    assert [rows for rows, _, _ in results] == [1, 0, 0, 0]
    assert [dummies for _, dummies, _ in results] == [[False], [True], [True], [True]]
    assert results[0][2] == 5
