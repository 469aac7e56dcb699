"""How many ranks do what: the parallel layout, passed around as a value.

Rank order is Megatron's default: tensor fastest, then context, data, pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.errors import UserError


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Sizes of the parallel dimensions of one side (trainer or engine)."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tensor * self.pipeline * self.context * self.data

    @classmethod
    def from_world_size(
        cls, world_size: int, *, tensor: int, pipeline: int, context: int, sequence_parallel: bool
    ) -> ParallelLayout:
        """The layout that fills ``world_size`` ranks; data parallelism takes what remains."""
        model_parallel = tensor * pipeline * context
        if world_size % model_parallel:
            raise UserError(
                f"parallel: {world_size} trainer ranks cannot be divided by tensor x pipeline x context "
                f"= {tensor} x {pipeline} x {context} = {model_parallel}"
            )
        return cls(tensor, pipeline, context, world_size // model_parallel, sequence_parallel)

    def coordinates(self, rank: int) -> RankCoordinates:
        """Where ``rank`` stands in each dimension."""
        assert 0 <= rank < self.world_size, (rank, self)
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return RankCoordinates(tensor=tensor, pipeline=pipeline, context=context, data=data)


@dataclass(frozen=True, slots=True)
class RankCoordinates:
    """One rank's position in a :class:`ParallelLayout`."""

    tensor: int = 0
    pipeline: int = 0
    context: int = 0
    data: int = 0
