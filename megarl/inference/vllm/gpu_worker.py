"""vLLM's worker on a GPU that the trainer shares. vLLM imports it where there is one; see build.py."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from vllm.v1.worker.gpu_worker import Worker

from megarl.errors import UserError
from megarl.platform import memory


class GpuWorker(Worker):
    """Takes what memory there is, and says so in one line where it is too little."""

    def determine_available_memory(self) -> int:
        """Bytes of the KV cache, as configured; UserError where they are not free."""
        wanted = int(super().determine_available_memory())
        memory.release_unused()  # of the pass that measured
        free, total = torch.cuda.mem_get_info(self.device)
        check_cache_fits(wanted, free, total, self.device.index)
        return wanted

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        # The weights that the engine is built with are freed at attach. In the pool of sleep mode their
        # memory would stay, and be copied to the host and back whenever the KV cache is given up.
        if tag == "weights":
            return nullcontext()
        pool: AbstractContextManager[None] = super()._maybe_get_memory_pool_context(tag)
        return pool


def check_cache_fits(wanted: int, free: int, total: int, device: int) -> None:
    """Raise UserError unless ``wanted`` bytes are ``free`` on a GPU of ``total``."""
    if wanted > free:
        gib = 2**30
        raise UserError(
            f"rollout.engine.kv_cache_gib: {wanted / gib:.2f} GiB do not fit GPU {device}: "
            f"{free / gib:.2f} of {total / gib:.1f} GiB are free beside the trainer and the engine's weights"
        )
