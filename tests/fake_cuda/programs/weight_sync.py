"""Cases of test_weight_sync.py: weights and memory that ranks hand over to an engine's process."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from case import case, main

FOLDER = Path(os.environ["FOLDER"])
MIB = 1 << 20


def tell(what: str, content: bytes = b"") -> None:
    (FOLDER / f"{what}.part").write_bytes(content)
    os.replace(FOLDER / f"{what}.part", FOLDER / what)


def hear(what: str) -> bytes:
    while not (FOLDER / what).exists():
        time.sleep(0.01)
    return (FOLDER / what).read_bytes()


def contents(storage: torch.UntypedStorage) -> list[int]:
    """The 32-bit words of device memory, read without this process's streams having anything to wait for."""
    words = torch.empty(0, dtype=torch.int32, device=storage.device).set_(storage)
    return [
        int(words.long().sum()),
        int((words.long() * torch.arange(1, len(words) + 1, device=words.device)).sum()),
    ]


@case
def publish(synchronize: str) -> Any:
    """A rank publishes weights with its adapters merged in; `no` leaves the wait for the device out."""
    from megarl import platform
    from megarl.config.lora import LoraConfig
    from megarl.config.parallel import ParallelConfig
    from megarl.trainer.megatron.initialize import finalize, initialize
    from megarl.weights.shared_storage import storages_of
    from tests.trainer import ranks

    context = initialize(ParallelConfig(), seed=1)
    policy = ranks.build(context, os.environ["MODEL"], lora=LoraConfig(rank=2, alpha=4))
    owners = policy.weights.owners()
    tell(f"owners-{context.rank}", pickle.dumps(owners))
    hear("attached")
    for adapter in policy.lora._adapters.values():
        for parameter in adapter.parameters():
            parameter.data.normal_()
    torch.cuda.synchronize()
    if synchronize == "no":
        platform.synchronize = lambda: None
    policy.weights.publish()
    if context.rank == 0:
        tell("published")
    hear("read")
    torch.cuda.synchronize()
    mine = {}
    params = policy.weights._params
    for number, storage in enumerate(storages_of(params)):
        mine[f"{context.rank}-{number}"] = contents(storage)
    finalize()
    return mine


@case
def attach() -> Any:
    """An engine's process: maps what the ranks offer, and reads it when rank 0 says that it is complete."""
    from megarl.weights import cuda_ipc

    torch.cuda.init()
    owners = pickle.loads(hear("owners-0"))
    storages = {
        f"{owner.rank}-{number}": cuda_ipc.open_storage(storage)
        for owner in owners
        for number, storage in enumerate(owner.storages)
    }
    hear("owners-1")
    tell("attached")
    hear("published")
    found = {name: contents(storage) for name, storage in storages.items()}
    tell("read")
    return found


@case
def give_memory(means: str) -> bool:
    """Return whether memory that rank 1 frees late is available when rank 0's engine takes it."""
    from megarl.cluster import collectives

    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    store = dist.FileStore(os.environ["STORE"], 2)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=2)
    collectives.join()
    dist.all_reduce(torch.ones(1, device="cuda"))
    torch.cuda.synchronize()
    held = torch.empty(150 * MIB, dtype=torch.uint8, device="cuda") if rank == 1 else None
    collectives.barrier()
    if rank == 1:
        time.sleep(1)
        del held
        torch.cuda.empty_cache()
    if means == "barrier":
        collectives.barrier()
    else:
        dist.broadcast_object_list([None], src=0)
    fits = True
    if rank == 0:
        try:
            torch.empty(150 * MIB, dtype=torch.uint8, device="cuda:1")
        except torch.cuda.OutOfMemoryError:
            fits = False
    collectives.barrier()
    dist.destroy_process_group()  # else its threads may end the process as it exits
    return fits


if __name__ == "__main__":
    main()
