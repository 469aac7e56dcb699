"""Two trainer ranks on fake GPUs give memory to the engine and take it back, over NCCL itself.

Rank 1 takes a second to free its memory, and so does the engine. Every rank prints a JSON line with the times
of its own give and take (time.monotonic: one clock for the machine).
"""

from __future__ import annotations

import json
import sys

import torch.distributed as dist

from megarl.cluster.collectives import broadcast, gather
from megarl.config.parallel import ParallelConfig
from megarl.trainer.megatron.initialize import finalize, initialize
from tests.weights import sync_ranks


def main() -> None:
    context = initialize(ParallelConfig(num_processes=2), seed=1)
    sync_ranks.broadcast_as_nccl = dist.broadcast_object_list
    broadcast(None)  # the first collective creates the communicator, for which all ranks wait
    gather(None)
    parts = ["gradients", "optimizer", "kv_cache"]
    times = {side: sync_ranks.give_memory(context, side, parts) for side in ("engine", "trainer")}
    # In one write: an unbuffered print() makes two, and the lines of ranks that share the output mix.
    sys.stdout.write(json.dumps(times) + "\n")
    sys.stdout.flush()
    finalize()


if __name__ == "__main__":
    main()
