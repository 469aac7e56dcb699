"""The vocabulary ops over 1, 2 and 4 shards of the vocabulary (gloo, one process each)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megarl.ops import (
    linear_token_logprob,
    linear_vocab_kl,
    support_min_logit,
    token_logprob,
    vocab_kl,
    vocab_kl_topk,
)

ROWS, COLUMNS, HIDDEN = 11, 1003, 8
DIRECTIONS: list[Any] = ["forward", "reverse", "jensen_shannon"]


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    student = 4 * torch.randn(ROWS, COLUMNS, generator=generator)
    student[3, : COLUMNS // 2] = -torch.inf  # one shard has nothing in this row
    teacher = student + torch.randn(ROWS, COLUMNS, generator=generator)
    targets = torch.randint(0, COLUMNS, (ROWS,), generator=generator)
    targets[:5] = torch.tensor([0, COLUMNS - 1, 250, COLUMNS - 2, 251])
    return {
        "student": student,
        "teacher": teacher,
        "targets": targets,
        "hidden": torch.randn(ROWS, HIDDEN, generator=generator),
        "weight": torch.randn(COLUMNS, HIDDEN, generator=generator),
        "teacher_weight": torch.randn(COLUMNS, HIDDEN, generator=generator),
        "heat": torch.linspace(0.7, 1.5, ROWS),
    }


def shard_bounds(rank: int, size: int) -> tuple[int, int]:
    """Uneven on purpose: the last shard takes what is left over."""
    width = COLUMNS // size
    return rank * width, COLUMNS if rank == size - 1 else (rank + 1) * width


def run_shard(rank: int, size: int) -> dict[str, torch.Tensor]:
    """Every op on one shard: its results, and gradients of the shard (summed over ranks for hidden)."""
    data = inputs()
    low, high = shard_bounds(rank, size)
    group = dist.new_group(list(range(size))) if size > 1 else None
    out: dict[str, torch.Tensor] = {}

    def record(name: str, make: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> None:
        leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
        result = make(*leaves)
        result.backward(torch.linspace(-1, 2, result.numel()))
        out[name] = result.detach()
        for number, leaf in enumerate(leaves):
            gradient = leaf.grad
            assert gradient is not None
            if leaf.shape == (ROWS, HIDDEN) and group is not None:
                dist.all_reduce(gradient, group=group)
            out[f"{name}.grad{number}"] = gradient.clone()

    heat, targets = data["heat"], data["targets"]
    student, teacher = data["student"][:, low:high], data["teacher"][:, low:high]
    weight, teacher_weight = data["weight"][low:high], data["teacher_weight"][low:high]
    shard: dict[str, Any] = {"temperature": heat, "vocab_start": low, "tp_group": group}
    both: dict[str, Any] = {"temperature": heat, "tp_group": group}
    log_q, ids = torch.log_softmax(data["teacher"], -1).topk(9)
    record("token", lambda x: torch.cat(token_logprob(x * 1.0, targets, **shard)), student)
    record(
        "linear", lambda h, w: torch.cat(linear_token_logprob(h, w, targets, **shard)), data["hidden"], weight
    )
    for direction in DIRECTIONS:
        record(f"kl_{direction}", lambda x: vocab_kl(x * 1.0, teacher, direction=direction, **both), student)  # noqa: B023
        record(
            f"linear_kl_{direction}",
            lambda h, w: linear_vocab_kl(h, w, data["hidden"], teacher_weight, direction=direction, **both),  # noqa: B023
            data["hidden"],
            weight,
        )
    out["support"] = support_min_logit(student, temperature=0.9, top_k=40, top_p=0.8, tp_group=group)
    record("topk", lambda x: vocab_kl_topk(x * 1.0, ids, log_q, renormalize=True, **shard), student)
    return out


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(run_shard(rank, size), f"{folder}/{rank}.pt")
    low, high = shard_bounds(rank, size)
    logits, world = inputs()["student"], dist.group.WORLD
    outside = torch.full((ROWS,), COLUMNS).index_fill(0, torch.tensor([0]), 0)
    with pytest.raises(ValueError, match=r"targets\[1\] = 1003 is outside the vocabulary \[0, 1003\)"):
        token_logprob(logits[:, low:high], outside, vocab_start=low, tp_group=world)
    with pytest.raises(ValueError, match="vocab_start: shards do not tile the vocabulary"):
        token_logprob(logits, outside, vocab_start=0, tp_group=world)
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_shards_equal_the_whole(size: int, tmp_path: Path) -> None:
    mp.spawn(worker, args=(size, str(tmp_path)), nprocs=size)  # type: ignore[attr-defined]
    whole = run_shard(0, 1)
    shards = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    assert len(whole) == 23
    for name, expected in whole.items():
        if expected.dim() == 1 or expected.shape == (
            ROWS,
            HIDDEN,
        ):  # results and summed gradients: on every rank
            assert all(torch.equal(shard[name], shards[0][name]) for shard in shards), name
            together = shards[0][name]
        else:  # gradients of logits are split along columns, those of weights along rows
            together = torch.cat([shard[name] for shard in shards], 1 if expected.shape[0] == ROWS else 0)
        difference = (together - expected).abs() / (1 + expected.abs())
        assert float(difference.max()) < 2e-5, name
