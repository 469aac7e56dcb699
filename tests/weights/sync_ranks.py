"""Functions run by trainer ranks in tests of the weight sync's order; see tests/trainer/world.py."""

from __future__ import annotations

import itertools
import pickle
import time
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from megarl.weights.checksum import RegionQuery, region_checksum
from tests.trainer import ranks

SLOW_SECONDS = 1.0


def publish_beside_a_slow_device(context: Any, model_dir: str, lora: dict[str, Any] | None) -> dict[str, Any]:
    """When rank 1's device was done, and when this rank was told that the weights are complete."""
    from megarl import platform
    from megarl.config.lora import LoraConfig

    policy = ranks.build(context, model_dir, lora=None if lora is None else LoraConfig(**lora))
    policy.weights.owners()
    done = []

    def wait_for_device() -> None:
        time.sleep(SLOW_SECONDS if context.rank == 1 else 0)
        done.append(time.monotonic())

    real, platform.synchronize = platform.synchronize, wait_for_device
    try:
        policy.weights.publish()
        told = [time.monotonic()]
        policy.weights.owners()
        told.append(time.monotonic())
    finally:
        platform.synchronize = real
    return {"done": done, "told": told}


_broadcasts = itertools.count()


def broadcast_as_nccl(values: list[Any], src: int = 0, **_: Any) -> None:
    """NCCL's broadcast: the source returns when it is enqueued (gloo's waits for ranks it sends to)."""
    store: Any = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    name = f"broadcast-{next(_broadcasts)}"
    if dist.get_rank() == src:
        store.set(name, pickle.dumps(values))
    else:
        values[:] = pickle.loads(store.get(name))


def give_memory(context: Any, side: Any, offload: list[str]) -> dict[str, float]:
    """When this rank's trainer and, on rank 0, the engine had given memory up, or began to take some.

    Rank 1 takes its time, and so does the engine.
    """
    from megarl.loops.online import OnlineLoop

    times: dict[str, float] = {}

    def gives(name: str) -> Any:
        def give(*_: Any) -> None:
            time.sleep(SLOW_SECONDS if (name == "engine gave") or context.rank == 1 else 0)
            times[name] = time.monotonic()

        return give

    def takes(name: str) -> Any:
        return lambda *_: times.setdefault(name, time.monotonic())

    loop = OnlineLoop.__new__(OnlineLoop)
    loop.config = SimpleNamespace(weights=SimpleNamespace(offload=offload))  # type: ignore[assignment]
    loop.learner = SimpleNamespace(  # type: ignore[assignment]
        trained=SimpleNamespace(sleep=gives("trainer gave"), wake=takes("trainer took"))
    )
    engine: Any = SimpleNamespace(sleep=gives("engine gave"), wake=takes("engine took"))
    loop.engine = engine if context.is_first else None
    real, dist.broadcast_object_list = dist.broadcast_object_list, broadcast_as_nccl
    try:
        loop.give_memory_to(side)
    finally:
        dist.broadcast_object_list = real
    return times


def checksums_by_other_handles(context: Any, model_dir: str) -> dict[str, Any]:
    """Offer weights and be asked for their checksums, where memory gets another handle whenever it is shared.

    So it is on a GPU: each call of torch's ``_share_cuda_`` counts and has an event of its own.
    """
    from megarl.weights import shared_storage
    from megarl.weights.sync_plan import SharedStorage

    made = []

    def share_anew(storage: Any, *_: Any) -> SharedStorage:
        made.append(storage)
        return SharedStorage((b"counter %d" % len(made), b"", storage.nbytes()))

    real, shared_storage._shared_handle = shared_storage._shared_handle, share_anew
    try:
        policy = ranks.build(context, model_dir)
        owner = next(o for o in policy.weights.owners() if o.rank == context.rank)
        queries = [
            RegionQuery(view, view.dtype, owner.storages[view.storage]) for view in owner.params.values()
        ]
        found = policy.weights.checksums(queries)
    finally:
        shared_storage._shared_handle = real
    params = policy.weights._params
    return {
        "found": [found.get(number) for number in range(len(queries))],
        "expected": [region_checksum(params[name]) for name in owner.params],
        "shared": len(made),
        "storages": len(owner.storages),
    }
