"""vLLM's worker on a GPU shared with the trainer. vLLM imports it on machines with a GPU; see build.py."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from vllm.v1.worker.gpu_worker import Worker

from megarl.errors import UserError
from megarl.platform import memory


class GpuWorker(Worker):
    """Use the configured KV cache, and report in one line if it does not fit."""

    def determine_available_memory(self) -> int:
        """Return the configured bytes of the KV cache; UserError if they are not free."""
        wanted = int(super().determine_available_memory())
        memory.release_unused()  # of the profiling pass
        free, total = torch.cuda.mem_get_info(self.device)
        check_cache_fits(wanted, free, total, self.device.index)
        return wanted

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        # The engine's initial weights are freed at attach. In the sleep-mode pool their memory would stay,
        # and be copied to the host and back whenever the KV cache is freed.
        if tag == "weights":
            return nullcontext()
        pool: AbstractContextManager[None] = super()._maybe_get_memory_pool_context(tag)
        return pool


def check_cache_fits(wanted: int, free: int, total: int, device: int) -> None:
    """Raise UserError unless ``wanted`` bytes are ``free`` on a GPU of ``total`` bytes."""
    if wanted > free:
        gib = 2**30
        raise UserError(
            f"rollout.engine.kv_cache_gib: {wanted / gib:.2f} GiB do not fit GPU {device}: "
            f"{free / gib:.2f} of {total / gib:.1f} GiB are free beside the trainer and the engine's weights"
        )
