"""Cases of test_streams.py: results of programs with and without the required synchronisation."""

from __future__ import annotations

import time

import torch
from case import case, main

SIZE = 1000


def counted(value: float) -> torch.Tensor:
    """A tensor that is complete on the device."""
    tensor = torch.full((SIZE,), value, device="cuda")
    torch.cuda.synchronize()
    return tensor


def copied_beside(waits: str) -> tuple[torch.Tensor, torch.cuda.Stream]:
    """What a side stream copies of what the current stream writes, after waiting for it or not."""
    x, y = counted(1), counted(0)
    side = torch.cuda.Stream()
    x.add_(1)
    if waits == "event":
        event = torch.cuda.Event()
        event.record()
        side.wait_event(event)
    elif waits == "stream":
        side.wait_stream(torch.cuda.current_stream())
    elif waits == "host":
        torch.cuda.current_stream().synchronize()
    with torch.cuda.stream(side):
        y.copy_(x)
    return y, side


@case
def between_streams(waits: str) -> float:
    """The host waits for the side stream."""
    y, side = copied_beside(waits)
    side.synchronize()
    return y.sum().item() / SIZE


@case
def before_all_streams_end(waits: str) -> float:
    """The host waits for the device, which orders nothing between the streams."""
    y, _ = copied_beside(waits)
    torch.cuda.synchronize()
    return y.sum().item() / SIZE


@case
def overwritten_early(waits: str) -> float:
    """A side stream reads a tensor that the current stream overwrites, after waiting for it or not."""
    x, y = counted(1), counted(0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        y.copy_(x)
    if waits == "stream":
        torch.cuda.current_stream().wait_stream(side)
    x.fill_(7)
    torch.cuda.current_stream().synchronize()
    side.synchronize()
    return y.sum().item() / SIZE


@case
def pinned_source(waits: str) -> float:
    """A pinned buffer that is used again while its copy to the device may be under way."""
    x, source = counted(0), torch.full((SIZE,), 3.0).pin_memory()
    x.copy_(source, non_blocking=True)
    if waits == "stream":
        torch.cuda.current_stream().synchronize()
    source.fill_(9)
    return x.sum().item() / SIZE


@case
def pageable_source() -> float:
    """An ordinary buffer may be used again at once: the copy has read it when it returns."""
    x, source = counted(0), torch.full((SIZE,), 3.0)
    x.copy_(source, non_blocking=True)
    source.fill_(9)
    return x.sum().item() / SIZE


@case
def pinned_destination(waits: str) -> float:
    """A pinned buffer that the host reads, after waiting for the copy or not."""
    x = counted(5)
    read = torch.zeros(SIZE).pin_memory()
    read.copy_(x, non_blocking=True)
    if waits == "stream":
        torch.cuda.current_stream().synchronize()
    return read.sum().item() / SIZE


@case
def event_states() -> list[bool]:
    """An event before and after it is waited for, and one that only time completes."""
    x = counted(0)
    first, second = torch.cuda.Event(), torch.cuda.Event()
    x.add_(1)
    first.record()
    before = first.query()
    first.synchronize()
    after = first.query()
    x.add_(1)
    second.record()
    at_once = second.query()
    time.sleep(1.5)  # FAKECUDA_STREAM_DELAY of the test is 0.5
    return [before, after, at_once, second.query()]


@case
def random_program(seed: str) -> bool:
    """Kernels and copies at random on four streams, ordered by events, give what program order gives."""
    random = torch.Generator().manual_seed(int(seed))

    def pick(n: int) -> int:
        return int(torch.randint(n, (1,), generator=random))

    streams = [torch.cuda.Stream() for _ in range(4)]
    device = [counted(float(i)) for i in range(6)]
    host = [torch.full((SIZE,), float(i)) for i in range(6)]
    for _ in range(300):
        stream, a, b = streams[pick(4)], pick(6), pick(6)
        for other in streams:  # the whole order, by events alone
            stream.wait_event(other.record_event())
        with torch.cuda.stream(stream):
            kind = pick(4)
            if kind == 0:
                device[a].copy_(device[b], non_blocking=True)
                host[a].copy_(host[b])
            elif kind == 1 and a != b:
                device[a].add_(device[b]).mul_(0.5)
                host[a].add_(host[b]).mul_(0.5)
            elif kind == 2:
                device[a].mul_(0.75)
                host[a].mul_(0.75)
            else:
                fresh = device[a] + 1
                device[b].copy_(fresh)
                host[b].copy_(host[a] + 1)
    torch.cuda.synchronize()
    return all(torch.equal(x.cpu(), y) for x, y in zip(device, host, strict=True))


if __name__ == "__main__":
    main()
