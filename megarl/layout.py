"""The parallel layout of a trainer or an engine.

Rank order is Megatron's default: tensor fastest, then context, data, pipeline. For experts the ranks of a
pipeline stage are divided separately: expert-tensor fastest, then expert, then expert-data.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.errors import UserError


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Sizes of the parallel dimensions of one side (trainer or engine).

    ``virtual`` > 1 splits each pipeline stage into that many model chunks (interleaved schedule).
    ``first_stage_layers`` and ``last_stage_layers`` give those stages other numbers of layers.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    virtual: int = 1
    expert: int = 1
    expert_tensor: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    @property
    def stage_size(self) -> int:
        """Ranks per pipeline stage."""
        return self.tensor * self.context * self.data

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return self.stage_size * self.pipeline

    @classmethod
    def from_world_size(
        cls,
        world_size: int,
        *,
        tensor: int,
        pipeline: int,
        context: int,
        sequence_parallel: bool,
        virtual: int = 1,
        expert: int = 1,
        expert_tensor: int = 1,
        first_stage_layers: int | None = None,
        last_stage_layers: int | None = None,
    ) -> ParallelLayout:
        """Return the layout of ``world_size`` ranks; data parallelism takes the rest.

        Raises:
            UserError: the sizes do not divide ``world_size``.
        """
        model_parallel = tensor * pipeline * context
        if world_size % model_parallel:
            raise UserError(
                f"parallel: {world_size} trainer ranks cannot be divided by tensor x pipeline x context "
                f"= {tensor} x {pipeline} x {context} = {model_parallel}"
            )
        stage, experts = world_size // pipeline, expert * expert_tensor
        if stage % experts:
            raise UserError(
                f"parallel: the {stage} ranks of a pipeline stage cannot be divided by "
                f"expert x expert-tensor = {expert} x {expert_tensor} = {experts}"
            )
        data = world_size // model_parallel
        return cls(
            tensor,
            pipeline,
            context,
            data,
            sequence_parallel,
            virtual,
            expert,
            expert_tensor,
            first_stage_layers,
            last_stage_layers,
        )

    def coordinates(self, rank: int) -> RankCoordinates:
        """Return the coordinates of ``rank``."""
        assert 0 <= rank < self.world_size, (rank, self)
        pipeline, in_stage = divmod(rank, self.stage_size)
        rest, tensor = divmod(in_stage, self.tensor)
        data, context = divmod(rest, self.context)
        rest, expert_tensor = divmod(in_stage, self.expert_tensor)
        expert_data, expert = divmod(rest, self.expert)
        return RankCoordinates(tensor, pipeline, context, data, expert, expert_tensor, expert_data)

    def rank_of(self, *, data: int, context: int, tensor: int = 0, pipeline: int = 0) -> int:
        """Return the rank at these coordinates."""
        return pipeline * self.stage_size + (data * self.context + context) * self.tensor + tensor

    def stage_layers(self, num_layers: int, stage: int, chunk: int = 0) -> range:
        """Return the global layer numbers of chunk ``chunk`` in pipeline stage ``stage``.

        Chunks are assigned round-robin: the first chunks of all stages precede any second chunk.

        Raises:
            UserError: the layers do not divide evenly.
        """
        uneven = self.first_stage_layers is not None or self.last_stage_layers is not None
        parts = self.pipeline * self.virtual
        if uneven and self.virtual > 1:
            raise UserError("parallel: virtual pipeline stages need stages of equal size")
        fixed = {0: self.first_stage_layers, parts - 1: self.last_stage_layers}
        taken = [size for size in fixed.values() if size is not None]
        rest, among = num_layers - sum(taken), parts - len(taken)
        if rest < among or (rest % among if among else rest):
            raise UserError(
                f"parallel.pipeline_parallel_size: {rest} layers do not divide by {among} stages"
                + (" (first and last stage set aside)" if uneven else "")
            )
        sizes = [size if (size := fixed.get(part)) is not None else rest // among for part in range(parts)]
        part = chunk * self.pipeline + stage
        start = sum(sizes[:part])
        return range(start, start + sizes[part])


@dataclass(frozen=True, slots=True)
class RankCoordinates:
    """One rank's position in a :class:`ParallelLayout`."""

    tensor: int = 0
    pipeline: int = 0
    context: int = 0
    data: int = 0
    expert: int = 0
    expert_tensor: int = 0
    expert_data: int = 0
