"""Cases of test_nccl.py: every collective over the fake NCCL against the same over gloo."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from case import case, main

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def start(device: int = RANK) -> torch.device:
    torch.cuda.set_device(device)
    store = dist.FileStore(os.environ["STORE"], WORLD)
    dist.init_process_group("nccl", store=store, rank=RANK, world_size=WORLD, timeout=timedelta(seconds=60))
    return torch.device("cuda", device)


def values(shape: int | tuple[int, ...], dtype: torch.dtype, rank: int = RANK) -> torch.Tensor:
    """Integers that every dtype represents exactly, and their sums too."""
    random = torch.Generator().manual_seed(100 + rank)
    return torch.randint(-4, 5, (shape,) if isinstance(shape, int) else shape, generator=random).to(dtype)


class Both:
    """Run a collective with NCCL on the device and with gloo on the CPU, and compare the results."""

    def __init__(self, nccl: dist.ProcessGroup | None, gloo: dist.ProcessGroup | None) -> None:
        self.nccl, self.gloo = nccl, gloo
        self.wrong: list[str] = []
        self.count = 0

    def run(self, name: str, call: Callable[..., Any], *tensors: Any) -> None:
        def to_device(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.cuda()
            return [to_device(v) for v in value]

        on_device = [to_device(t) for t in tensors]
        call(*on_device, group=self.nccl)
        call(*tensors, group=self.gloo)
        for a, b in zip(on_device, tensors, strict=True):
            same = (
                torch.equal(a.cpu(), b)
                if isinstance(b, torch.Tensor)
                else all(torch.equal(x.cpu(), y) for x, y in zip(a, b, strict=True))
            )
            self.count += 1
            if not same:
                self.wrong.append(name)


@case
def against_gloo() -> Any:
    start()
    both = Both(dist.group.WORLD, dist.new_group(backend="gloo"))
    operations = {
        "sum": dist.ReduceOp.SUM,
        "max": dist.ReduceOp.MAX,
        "min": dist.ReduceOp.MIN,
        "product": dist.ReduceOp.PRODUCT,
    }
    for dtype in (*FLOATING, torch.int32, torch.int64, torch.uint8):
        for name, op in operations.items():
            x = values(1001, dtype).abs()
            both.run(
                f"all_reduce {name} {dtype}", lambda t, group, op=op: dist.all_reduce(t, op, group=group), x
            )
    sizes = [[(s + r) % 3 + 1 for r in range(WORLD)] for s in range(WORLD)]  # sent by s to r
    received = [sizes[s][RANK] for s in range(WORLD)]
    for dtype in (torch.float32, torch.bfloat16):
        for root in range(WORLD):
            both.run(
                f"broadcast {root}",
                lambda t, group, r=root: dist.broadcast(t, r, group=group),
                values(77, dtype),
            )
            for n in (77,):
                x = values(n, dtype)
                nccl, gloo = x.cuda(), x.clone()
                dist.reduce(nccl, root)
                dist.reduce(gloo, root, group=both.gloo)
                if root == RANK and not torch.equal(nccl.cpu(), gloo):
                    both.wrong.append(f"reduce {root}")
        parts = [torch.zeros(9, dtype=dtype) for _ in range(WORLD)]
        both.run(
            "all_gather", lambda p, t, group: dist.all_gather(p, t, group=group), parts, values(9, dtype)
        )
        both.run(
            "all_gather_into_tensor",
            lambda o, t, group: dist.all_gather_into_tensor(o, t, group=group),
            torch.zeros(9 * WORLD, dtype=dtype),
            values(9, dtype),
        )
        both.run(
            "reduce_scatter_tensor",
            lambda o, t, group: dist.reduce_scatter_tensor(o, t, group=group),
            torch.zeros(9, dtype=dtype),
            values(9 * WORLD, dtype),
        )
        both.run(
            "all_to_all_single",
            lambda o, t, group: dist.all_to_all_single(o, t, group=group),
            torch.zeros(6 * WORLD, dtype=dtype),
            values(6 * WORLD, dtype),
        )
        both.run(
            "all_to_all_single uneven",
            lambda o, t, group: dist.all_to_all_single(o, t, received, sizes[RANK], group=group),
            torch.zeros(sum(received), dtype=dtype),
            values(sum(sizes[RANK]), dtype),
        )
        if RANK == 0:
            both.run(
                "scatter from 0",
                lambda o, t, group: dist.scatter(o, t, 0, group=group),
                torch.zeros(4, dtype=dtype),
                [values(4, dtype, r) for r in range(WORLD)],
            )
        else:
            both.run(
                "scatter", lambda o, group: dist.scatter(o, None, 0, group=group), torch.zeros(4, dtype=dtype)
            )
    average = values(50, torch.float32).cuda()
    dist.all_reduce(average, dist.ReduceOp.AVG)
    expected = torch.stack([values(50, torch.float32, r) for r in range(WORLD)]).mean(0)
    if not torch.allclose(average.cpu(), expected, rtol=1e-6):
        both.wrong.append("average")
    scaled = values(50, torch.float32).cuda()
    dist.all_reduce(scaled, dist._make_nccl_premul_sum(0.25))
    if not torch.equal(scaled.cpu(), expected * WORLD / 4):
        both.wrong.append("pre-multiplied sum")
    dist.destroy_process_group()
    return {"compared": both.count, "wrong": both.wrong}


@case
def between_pairs() -> Any:
    """Sends and receives: a ring in one batch, both directions at once, single ones, and objects."""
    device = start()
    result: dict[str, Any] = {}
    following, previous = (RANK + 1) % WORLD, (RANK - 1) % WORLD
    mine = torch.full((3,), float(RANK), device=device)
    from_previous, from_following = torch.empty_like(mine), torch.empty_like(mine)
    batch = [
        dist.P2POp(dist.irecv, from_previous, previous),
        dist.P2POp(dist.irecv, from_following, following, tag=1),
        dist.P2POp(dist.isend, mine, following),
        dist.P2POp(dist.isend, mine * 10, previous, tag=1),
    ]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    result["ring"] = [from_previous[0].item(), from_following[0].item()]
    if RANK == 0:
        for n in range(3):
            dist.send(torch.full((2,), float(n), device=device), 1)
    if RANK == 1:
        got = []
        for _ in range(3):
            buffer = torch.empty(2, device=device)
            dist.recv(buffer, 0)
            got.append(buffer[0].item())
        result["in order"] = got
    objects: list[Any] = [None] * WORLD
    dist.all_gather_object(objects, {"rank": RANK})
    result["objects"] = objects
    return result


@case
def subgroups() -> Any:
    """Communicators of some ranks beside those of all, used in another order on each rank's own groups."""
    device = start()
    pairs = [dist.new_group([r, r + 1]) for r in range(0, WORLD, 2)]
    strides = [dist.new_group(list(range(r, WORLD, 2))) for r in range(2)]
    x, y, z = (torch.full((1,), float(RANK + 1), device=device) for _ in range(3))
    dist.all_reduce(x, group=pairs[RANK // 2])
    dist.all_reduce(y, group=strides[RANK % 2])
    dist.all_reduce(z)
    dist.barrier()
    return [t.item() for t in (x, y, z)]


@case
def captured() -> Any:
    """A collective in a graph: it runs at each replay, with the input's values at that time."""
    device = start()
    x = torch.full((4,), float(RANK + 1), device=device)
    dist.all_reduce(x.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        dist.all_reduce(y)
    results = []
    for scale in (1.0, 3.0):
        x.fill_(scale * (RANK + 1))
        graph.replay()
        results.append(y[0].item())
    torch.cuda.synchronize()
    return results


@case
def one_gpu_twice() -> str:
    try:
        start(0)
        dist.all_reduce(torch.ones(1, device="cuda"))
    except dist.DistBackendError as error:
        return str(error)
    return ""


@case
def mismatch(kind: str) -> str:
    """Ranks that disagree about a collective; the fake NCCL ends them."""
    device = start()
    if kind == "size":
        dist.all_reduce(torch.ones(5 + RANK, device=device))
    elif kind == "type":
        dist.all_reduce(torch.ones(5, device=device, dtype=torch.float32 if RANK else torch.int32))
    else:
        x = torch.ones(5, device=device)
        dist.all_reduce(x) if RANK else dist.broadcast(x, 1)
    torch.cuda.synchronize()
    return "passed"


@case
def returns_early() -> Any:
    """How long a broadcast holds its source and a rank that comes 3 seconds late, and a host barrier both."""
    device = start()
    gloo = dist.new_group(backend="gloo")
    dist.broadcast(torch.ones(1, device=device), 0)
    torch.cuda.synchronize()
    dist.barrier(group=gloo)
    begin = time.monotonic()
    if RANK == 1:
        time.sleep(3)
    dist.broadcast_object_list([{"released": True}] if RANK == 0 else [None], 0, device=device)
    broadcast = time.monotonic() - begin
    dist.barrier(group=gloo)
    return [broadcast, time.monotonic() - begin]


@case
def delayed_until_asked() -> list[float]:
    """Read a tensor before and after all ranks run three queued reductions."""
    x = torch.ones(1, device=start())
    torch.cuda.synchronize()
    store = dist.distributed_c10d._get_default_store()
    found = []
    for number in range(3):
        dist.all_reduce(x)  # the first makes the communicator, for which the ranks wait for each other
        time.sleep(0.5)
        found.append(ctypes.c_float.from_address(x.data_ptr()).value)  # this device's memory is the host's
        store.set(f"{number} looked {RANK}", "")
        store.wait([f"{number} looked {rank}" for rank in range(WORLD)])
        found.append(x.item())
    return found


@case
def ordered_by_streams(waits: str) -> float:
    """Gradients are written on one stream and summed on another, as overlapped reduction does."""
    device = start()
    x = torch.zeros(1000, device=device)
    dist.all_reduce(x)  # makes the communicator, which takes time
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    x.add_(RANK + 1)
    if waits == "stream":
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # NCCL's stream waits for the current one, which is this
        work = dist.all_reduce(x, async_op=True)
    work.wait()
    torch.cuda.synchronize()
    return x.sum().item() / len(x)


if __name__ == "__main__":
    main()
