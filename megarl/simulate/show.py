"""Print a simulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from rich.console import Console
from rich.table import Table

from megarl.layout import ParallelLayout
from megarl.simulate.memory import GIB, GpuMemory, while_generating, while_training
from megarl.simulate.run import Simulation, WeightSync
from megarl.simulate.transfer import Seconds


def show(simulation: Simulation, console: Console) -> None:
    """Print layouts, memory, transfers, and the cost of gathering for comparison."""
    _header(simulation, console)
    console.print(_memory_table(simulation))
    _fit(simulation, console)
    _collectives(simulation, console)
    if simulation.weight_sync is not None:
        console.print(_transfer_table(simulation, simulation.weight_sync))
        _weight_sync(simulation.weight_sync, console)


def _header(simulation: Simulation, console: Console) -> None:
    config, layouts, spec = simulation.config, simulation.layouts, simulation.spec
    active = f", {simulation.num_active_parameters / 1e9:.1f}B active" if spec.moe else ""
    console.print(
        f"[bold]{config.model.path}[/]: {spec.family}, {simulation.num_parameters / 1e9:.1f}B parameters"
        f"{active}"
    )
    console.print(f"trainer: {layouts.trainer.world_size} GPUs, {_sizes(layouts.trainer)}")
    where = "the trainer's GPUs" if layouts.colocated else f"{layouts.engine_gpus} separate GPUs"
    if layouts.num_engines:
        console.print(f"engines: {layouts.num_engines} of {_sizes(layouts.engine)} on {where}")
    for note in simulation.notes:
        console.print(f"[yellow]note:[/] {note}")


def _sizes(layout: ParallelLayout) -> str:
    parts = [
        ("tensor", layout.tensor),
        ("context", layout.context),
        ("pipeline", layout.pipeline),
        ("virtual", layout.virtual),
        ("expert", layout.expert),
        ("expert-tensor", layout.expert_tensor),
        ("data", layout.data),
    ]
    return " x ".join(f"{name} {size}" for name, size in parts if size > 1) or "1 rank"


_ROWS: list[tuple[str, Callable[[GpuMemory], int]]] = [
    ("parameters", lambda gpu: gpu.parameters),
    ("gradients", lambda gpu: gpu.gradients),
    ("optimizer state", lambda gpu: gpu.optimizer),
    ("reference", lambda gpu: gpu.reference),
    ("merged adapters", lambda gpu: gpu.merged),
    ("gathered weights", lambda gpu: gpu.gathered),
    ("activations", lambda gpu: gpu.activations),
    ("engine's own parameters", lambda gpu: gpu.engine_parameters),
    ("KV cache", lambda gpu: gpu.kv_cache),
]


def _memory_table(simulation: Simulation) -> Table:
    offload = simulation.offload
    fullest = {name: simulation.gpus[number] for name, number in simulation.fullest.items()}
    table = Table(title="Memory per GPU, GiB", title_justify="left")
    table.add_column("")
    table.add_column("most", justify="right")
    for name, number in simulation.fullest.items():
        table.add_column(f"{name} {number}", justify="right")

    def add(name: str, of: Callable[[GpuMemory], int], style: str | None = None) -> None:
        values = [max(map(of, simulation.gpus)), *map(of, fullest.values())]
        table.add_row(name, *(f"{value / GIB:.2f}" for value in values), style=style)

    for name, of in _ROWS:
        if any(map(of, simulation.gpus)) or (name == "engine's own parameters" and simulation.weight_sync):
            add(name, of)
    table.add_section()
    add("while training", lambda gpu: while_training(gpu, offload).total, "bold")
    if simulation.weight_sync is not None:
        add("while generating", lambda gpu: while_generating(gpu, offload).total, "bold")
    return table


def _fit(simulation: Simulation, console: Console) -> None:
    gpu, free = simulation.config.gpu, simulation.free_bytes
    what = f"{gpu.memory_gib:g} GiB less {gpu.reserved_gib:g} reserved"
    if free >= 0:
        console.print(f"[green]fits[/]: {free / GIB:.2f} GiB left of {what}")
    else:
        console.print(f"[red]does not fit[/]: {-free / GIB:.2f} GiB more than {what}")
    if simulation.weight_sync is None:
        return
    token, length = simulation.kv_bytes_per_token, simulation.config.workload.sequence_length
    tokens = max(memory.kv_cache for memory in simulation.gpus) // token
    console.print(
        f"KV cache: {token / 1024:.1f} KiB per token and GPU; holds {tokens:,} tokens, "
        f"{tokens // length:,} sequences of {length:,}, per data-parallel rank of an engine"
    )


def _collectives(simulation: Simulation, console: Console) -> None:
    if (found := simulation.collectives) is None:
        return
    trainer, layout = simulation.config.trainer, simulation.layouts.trainer
    replicas = f", {trainer.replicate_size} replicas" if trainer.replicate_size > 1 else ""
    when = "microbatch" if trainer.reduce_each_microbatch else "step"
    also = f" and {found.replicated / GIB:.2f} between replicas" if found.replicated else ""
    console.print(
        f"FSDP over {layout.data // trainer.replicate_size} GPUs{replicas}: a microbatch gathers "
        f"{found.gathered / GIB:.2f} GiB of weights on each ({found.gather_seconds.bound:.3f} s), a {when} "
        f"reduces {found.reduced / GIB:.2f} GiB of gradients{also} ({found.reduce_seconds.bound:.3f} s)"
    )


def _transfer_table(simulation: Simulation, sync: WeightSync) -> Table:
    traffic, times = sync.traffic, sync.seconds
    table = Table(title="Weights from trainer to engine, GiB per GPU", title_justify="left")
    for name in ("", "least", "mean", "most", "all GPUs", "busiest, s"):
        table.add_column(name, justify="right" if name else "left")

    def add(name: str, values: Sequence[int], time: float | None = None) -> None:
        stated = [min(values), mean(values), max(values), sum(values)]
        spent = "" if time is None else f"{time:.3f}"
        table.add_row(name, *(f"{value / GIB:,.2f}" for value in stated), spent)

    add("aliased", traffic.aliased, 0.0)
    add("copied within the GPU", traffic.local, times.local)
    add("from the same host (NVLink)", traffic.nvlink, times.nvlink)
    add("from other hosts (network)", traffic.network, times.network)
    if any(traffic.padding):
        add("vocabulary padding, not written", traffic.padding)
    add("engine's parameters", simulation.engine_bytes)
    table.add_section()
    add("sent within the host", traffic.sent_nvlink)
    add("sent to other hosts", traffic.sent_network)
    return table


def _weight_sync(sync: WeightSync, console: Console) -> None:
    gathering, copies = sync.gathering, sync.traffic.copies
    console.print(
        f"weight sync: [bold]{_bound(sync.seconds)}[/]; at most {max(copies):,} copies into one GPU"
    )
    sizes = [f"{size / GIB:,.1f} GiB" for size in (gathering.network, gathering.nvlink, gathering.local)]
    console.print(
        f"gathering every tensor on every GPU instead: {_bound(gathering.seconds)}; up to {sizes[0]} over "
        f"the network, {sizes[1]} over NVLink and {sizes[2]} copied locally per GPU"
    )


def _bound(times: Seconds) -> str:
    kinds = {"local copies": times.local, "NVLink": times.nvlink, "network": times.network}
    slowest = max(kinds, key=lambda kind: kinds[kind])
    return f"at least {times.bound:.3f} s ({slowest})" if times.bound else "nothing to move"
