"""Share weights with another process through cudaIpc: writes are visible at once, also after a kill."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from gpu_checks.report import Report

SECONDS = 30.0  # for a process to start, import torch and answer


def run(report: Report) -> None:
    """Write as owner and read as reader, without a signal in between; and the reverse."""
    from megarl.weights.shared_storage import pool_parameters, share_parameters

    rows = 64 if report.quick else 8192
    params: dict[str, torch.Tensor] = {
        f"layer{n}": torch.nn.Parameter(torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16))
        for n in range(4)
    }
    pool_parameters(params)
    owner = share_parameters(params, [])
    report.figure("handles", len(owner.storages))
    report.figure("shared_mib", sum(storage.num_bytes for storage in owner.storages) / 2**20)
    free = torch.cuda.mem_get_info()[0]
    reader = Reader(owner)
    report.figure("first_open_ms", reader.open_ms)
    report.figure(
        "reader_memory_mib", (free - torch.cuda.mem_get_info()[0]) / 2**20
    )  # mostly its CUDA context
    exchange(report, reader, params, "first")
    reader.process.kill()  # like a dying engine: with the memory mapped
    reader.process.join()
    again = Reader(share_parameters(params, []))
    report.figure("open_after_kill_ms", again.open_ms)
    exchange(report, again, params, "after a kill")
    same = Reader(owner)  # with the record given to the first one
    exchange(report, same, params, "after a kill, with the first record")
    for left in (again, same):
        left.ask("end")
        left.process.join(SECONDS)
        report.check(left.process.exitcode == 0, f"a reader ended with {left.process.exitcode}")
    intact = all(torch.isfinite(param).all().item() for param in params.values())
    report.check(intact, "the owner's memory is damaged after its readers have ended")
    report.summary(f"mapped in {again.open_ms:.1f} ms; a killed reader disturbs nobody")


class Reader:
    """A process that has mapped the parameters."""

    def __init__(self, owner: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(owner, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.open_ms: float = self._answer()

    def ask(self, *question: Any) -> Any:
        """Return its answer; re-raise an exception of that process."""
        self.pipe.send(question)
        return self._answer() if question[0] != "end" else None

    def _answer(self) -> Any:
        if not self.pipe.poll(SECONDS):
            raise TimeoutError("the second process does not answer")
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def exchange(report: Report, reader: Reader, params: dict[str, torch.Tensor], when: str) -> None:
    """Write once on each side, and read on the other."""
    with torch.no_grad():
        for param in params.values():
            param.mul_(0.5).add_(1)
    torch.cuda.synchronize()
    for name, param in params.items():
        report.check(
            reader.ask("sum", name) == _sum(param), f"{when}: the reader does not see the owner's {name}"
        )
    reader.ask("write", "layer2")
    report.check(
        bool((params["layer2"][3] == 7).all()), f"{when}: the owner does not see what the reader wrote"
    )


def _sum(tensor: torch.Tensor) -> int:
    return int(tensor.detach().view(torch.int16).long().sum())


def _serve(owner: Any, pipe: Connection) -> None:
    from megarl.weights.shared_storage import open_storage

    try:
        torch.cuda.init()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        storages = [open_storage(shared) for shared in owner.storages]
        views = {
            name: torch.empty(0, dtype=getattr(torch, view.dtype), device="cuda").set_(
                storages[view.storage], view.offset, view.shape, view.stride
            )
            for name, view in owner.params.items()
        }
        pipe.send(1e3 * (time.perf_counter() - begin))
        while True:
            what, *name = pipe.recv()
            if what == "end":
                return
            if what == "write":
                views[name[0]][3] = 7
                torch.cuda.synchronize()
                pipe.send(None)
            else:
                pipe.send(_sum(views[name[0]]))
    except EOFError:
        return
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
