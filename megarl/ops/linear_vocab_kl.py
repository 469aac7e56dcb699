"""vocab_kl from hidden states and heads, without the student's or the teacher's full logits.

Tiles of both logits are computed one after the other, forward and again backward, as in linear_token_logprob;
the GEMMs are torch's, the sums and gradients those of vocab_kl.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megarl.ops._shards import LOGITS_CAUSE, check_finite, gather_shards, group_size, temperature_tensor
from megarl.ops.linear_token_logprob import DEFAULT_MAX_EXTRA_BYTES
from megarl.ops.vocab_kl import (
    Direction,
    _check_direction,
    _Divergence,
    divergence,
    log_normalisers,
    merge_parts,
)

TILE_COLUMNS = 4096  # as in csrc/common/head_tiles.h


def linear_vocab_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    direction: Direction = "forward",
    temperature: float | torch.Tensor = 1.0,
    beta: float = 0.5,
    tp_group: dist.ProcessGroup | None = None,
    max_extra_bytes: int = DEFAULT_MAX_EXTRA_BYTES,
    check_numerics: bool = False,
) -> torch.Tensor:
    """Return the divergence [R] of softmax(hidden [R, H] @ weight [V_shard, H].T) from the teacher's.

    The teacher may have another hidden size; vocabulary shards must be the same. The two tiles of logits take
    at most max_extra_bytes together. As in ``linear_token_logprob``, the gradient of hidden is this shard's
    contribution only.

    Raises:
        ValueError: shapes do not match.
    """
    _check_direction(direction)
    if teacher_hidden.shape[0] != hidden.shape[0] or teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"megarl::linear_vocab_kl: teacher_hidden {list(teacher_hidden.shape)} and teacher_weight "
            f"{list(teacher_weight.shape)} must have {hidden.shape[0]} and {weight.shape[0]} rows"
        )
    teacher = (teacher_hidden.detach(), teacher_weight.detach())
    heat = temperature_tensor(temperature, hidden.device)
    if direction == "jensen_shannon":
        with torch.no_grad():
            parts = _HeadKl.apply(hidden, weight, *teacher, heat, max_extra_bytes)
            lses = log_normalisers(merge_parts(gather_shards(parts, tp_group, (0, 0))[0], heat), heat)
        result: torch.Tensor = _HeadJensenShannon.apply(
            hidden, weight, *teacher, heat, *lses, beta, tp_group, max_extra_bytes
        )
    else:
        stats = _HeadKl.apply(hidden, weight, *teacher, heat, max_extra_bytes)
        result = divergence(merge_parts(gather_shards(stats, tp_group, (0, 0))[0], heat), direction)
    if check_numerics:
        check_finite("linear_vocab_kl", _Divergence(result), cause=LOGITS_CAUSE)
    return result


class _Tiles:
    """Pairs of logits tiles, all columns of a block of rows before the next block; and their gradients."""

    def __init__(self, heads: tuple[torch.Tensor, ...], heat: torch.Tensor, max_extra_bytes: int) -> None:
        self.hidden, self.weight, self.teacher_hidden, self.teacher_weight = heads
        self.heat = heat
        rows, columns = self.hidden.shape[0], self.weight.shape[0]
        logits = max(1, max_extra_bytes // (2 * self.hidden.element_size()))
        self.columns = max(1, min(columns, TILE_COLUMNS, logits))
        self.rows = max(1, min(rows, logits // self.columns))

    def __iter__(self) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield (rows, columns, student tile, teacher tile, temperature of the rows)."""
        for row in range(0, self.hidden.shape[0], self.rows):
            rows = slice(row, min(row + self.rows, self.hidden.shape[0]))
            heat = self.heat if self.heat.numel() == 1 else self.heat[rows]
            for column in range(0, self.weight.shape[0], self.columns):
                columns = slice(column, min(column + self.columns, self.weight.shape[0]))
                student = self.hidden[rows] @ self.weight[columns].t()
                yield (
                    rows,
                    columns,
                    student,
                    self.teacher_hidden[rows] @ self.teacher_weight[columns].t(),
                    heat,
                )

    def zero_gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return zeroed accumulators of the gradients of hidden and weight, float32 for 16-bit dtypes."""
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        return torch.zeros_like(self.hidden, dtype=dtype), torch.zeros_like(self.weight)

    def add(
        self,
        gradients: tuple[torch.Tensor, torch.Tensor],
        rows: slice,
        columns: slice,
        tile: torch.Tensor,
    ) -> None:
        """Multiply a tile's gradient into those of hidden and weight."""
        gradients[0][rows] += tile @ self.weight[columns]
        gradients[1][columns].addmm_(tile.t(), self.hidden[rows])


class _HeadKl(torch.autograd.Function):
    """Statistics [R, 6] of vocab_kl; its maxima are constants to the gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *heads, heat, max_extra_bytes = inputs
        tiles = _Tiles(tuple(heads), heat, max_extra_bytes)
        dtype = torch.promote_types(heads[0].dtype, torch.float32)
        stats = heads[0].new_empty(heads[0].shape[0], 6, dtype=dtype)
        parts: list[torch.Tensor] = []
        for rows, columns, student, teacher, row_heat in tiles:
            parts.append(torch.ops.megarl.vocab_kl(student, teacher, row_heat, True))
            if columns.stop == heads[1].shape[0]:
                stats[rows] = merge_parts(torch.stack(parts), row_heat)
                parts.clear()
        ctx.save_for_backward(*heads, heat, stats)
        ctx.max_extra_bytes = max_extra_bytes
        return stats

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *heads, heat, stats = ctx.saved_tensors
        tiles = _Tiles(tuple(heads), heat, ctx.max_extra_bytes)
        gradients = tiles.zero_gradients()
        for rows, columns, student, teacher, row_heat in tiles:
            torch.ops.megarl.vocab_kl_backward_(
                student, teacher, row_heat, stats[rows, 0:3:2], grads[0][rows]
            )
            tiles.add(gradients, rows, columns, student)
        return gradients[0].to(heads[0].dtype), gradients[1], None, None, None, None


class _HeadJensenShannon(torch.autograd.Function):
    """The second pass of Jensen-Shannon, given both normalisers; one all-reduce."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        *heads, heat, student_lse, teacher_lse, beta, tp_group, max_extra_bytes = inputs
        sums = student_lse.new_zeros(student_lse.shape[0], 2)
        for rows, _, student, teacher, row_heat in _Tiles(tuple(heads), heat, max_extra_bytes):
            sums[rows] += torch.ops.megarl.vocab_js(
                student, teacher, row_heat, student_lse[rows], teacher_lse[rows], beta
            )
        if group_size(tp_group) > 1:
            dist.all_reduce(sums, group=tp_group)
        ctx.save_for_backward(*heads, heat, student_lse, teacher_lse, sums)
        ctx.beta = beta
        ctx.max_extra_bytes = max_extra_bytes
        return (1 - beta) * sums[:, 0] + beta * sums[:, 1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *heads, heat, student_lse, teacher_lse, sums = ctx.saved_tensors
        tiles = _Tiles(tuple(heads), heat, ctx.max_extra_bytes)
        gradients = tiles.zero_gradients()
        for rows, columns, student, teacher, row_heat in tiles:
            torch.ops.megarl.vocab_js_backward_(
                student,
                teacher,
                row_heat,
                student_lse[rows],
                teacher_lse[rows],
                ctx.beta,
                sums[rows, 0],
                grads[0][rows],
            )
            tiles.add(gradients, rows, columns, student)
        return gradients[0].to(heads[0].dtype), gradients[1], *(None,) * 8
