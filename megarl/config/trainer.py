"""Training backend, and the options that only one backend has."""

from __future__ import annotations

from typing import Literal

from megarl.config.section import PositiveInt, Problems, Section, rule


class TrainerConfig(Section):
    """Backend that computes passes and optimizer steps."""

    backend: Literal["megatron", "torch"] = "megatron"
    """megatron: Megatron-Core, for families with a table here; torch: FSDP2, for transformers' decoders."""
    replicate_size: PositiveInt = 1
    """torch: copies of the model among data-parallel ranks (HSDP), each sharded over its part of them."""
    reshard_after_forward: bool = True
    """torch: drop a layer's gathered weights after its forward pass and gather them again in the backward."""
    reduce_each_microbatch: bool = False
    """torch: reduce gradients after each microbatch, not once a step: a rank then keeps only its shards."""
    cpu_offload: bool = False
    """torch: parameters, gradients and optimizer in host memory; layers come to the GPU in turn."""

    @property
    def any_family(self) -> bool:
        """Whether models without a table can be trained."""
        return self.backend == "torch"

    @rule
    def _of_torch(self) -> Problems:
        """All fields below `backend` need `backend: torch`."""
        if self.backend != "torch":
            names = "replicate_size reshard_after_forward reduce_each_microbatch cpu_offload"
            yield from self.unused(names, "needs trainer.backend = torch", "backend")
