"""Which node and GPUs each of several engines gets: those of trainer ranks, whose memory it aliases."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megarl import platform
from megarl.cluster.ray_runtime import NODE_VARIABLE
from megarl.cluster.variables import cores
from megarl.config.rollout import EngineConfig
from megarl.errors import UserError
from megarl.weights.memory_domain import host_id

_FIELD = "rollout.engine.data_parallel_size"


@dataclass(frozen=True, slots=True)
class TrainerPlace:
    """Where trainer ranks are: one of them, or all of a host, in rank order."""

    host: str  # as megarl.weights.memory_domain names it
    node: str  # Ray's name of it, "" where Ray has not started the ranks
    devices: tuple[str, ...]  # GPUs, as CUDA_VISIBLE_DEVICES names them; empty on a CPU
    cores: int  # CPU cores, as many as one rank may use


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """Where an engine goes. Its ranks take the first of ``devices``; the others are there to be read."""

    node: str = ""  # Ray's name of it; "" is the driver's
    devices: str = ""  # as CUDA_VISIBLE_DEVICES lists them; "" are those that the driver sees
    cores: int = 0  # CPU cores for it alone while it generates; 0 are all that the driver may use


BESIDE_DRIVER = EnginePlace()


def this_rank() -> TrainerPlace:
    """This trainer rank's place, with the GPU it trains on; ``platform.install`` has been called."""
    device = platform.current().device
    devices = () if device.type == "cpu" else (_visible_devices()[device.index],)
    return TrainerPlace(host_id(), os.environ.get(NODE_VARIABLE, ""), devices, cores())


def this_machine() -> TrainerPlace:
    """The same with every GPU that this process sees, where it alone is the trainer."""
    devices = () if platform.chosen_name() == "cpu" else _visible_devices()
    return TrainerPlace(host_id(), os.environ.get(NODE_VARIABLE, ""), devices, cores())


def place_engines(
    engine: EngineConfig, ranks: Sequence[TrainerPlace], *, while_training: bool = False
) -> list[EnginePlace]:
    """A place for each engine: hosts in rank order, on each as many engines beside its first ranks.

    A single engine stays beside the driver, whatever ``ranks`` are. Engines that generate
    ``while_training`` leave half of the cores to the trainer.

    Raises:
        UserError: the engines do not divide by the hosts, a host has too few GPUs, or Ray does not know the
            hosts but the first.
    """
    count, size = engine.data_parallel_size, engine.tensor_parallel_size
    if count == 1:
        return [EnginePlace(cores=max(1, cores() // 2))] if while_training else [BESIDE_DRIVER]
    hosts = _hosts(ranks)
    if count % len(hosts):
        raise UserError(
            f"{_FIELD}: {count} engines cannot be dealt evenly to the {len(hosts)} hosts of the trainer; "
            f"set 1 or a multiple of {len(hosts)}"
        )
    if len(hosts) > 1 and not all(host.node for host in hosts):
        raise UserError(
            f"{_FIELD}: {count} engines on {len(hosts)} hosts need `launcher: ray`; under torchrun and srun "
            "Ray knows rank 0's host alone, where one engine can be (got a run that Ray has not started)"
        )
    each = count // len(hosts)
    machines = Counter(host.host for host in hosts)  # one machine may be several nodes
    places = []
    for host in hosts:
        if host.devices and len(host.devices) < each * size:
            raise UserError(
                f"{_FIELD}: {each} engines with rollout.engine.tensor_parallel_size = {size} on a host "
                f"need {each * size} GPUs, its trainer has {len(host.devices)}"
            )
        for number in range(each):
            own = host.devices[number * size : (number + 1) * size]
            others = [device for device in host.devices if device not in own]
            sharers = each * machines[host.host] * (2 if while_training else 1)
            places.append(EnginePlace(host.node, ",".join([*own, *others]), max(1, host.cores // sharers)))
    return places


def threads_per_rank(config: EngineConfig, place: EnginePlace) -> int:
    """CPU threads of each rank of an engine at ``place``."""
    return max(1, (config.num_threads or place.cores or cores()) // config.tensor_parallel_size)


def _hosts(ranks: Sequence[TrainerPlace]) -> list[TrainerPlace]:
    """The hosts in the order of their first ranks, each with what all its ranks have."""
    hosts: dict[tuple[str, str], list[TrainerPlace]] = {}
    for rank in ranks:
        hosts.setdefault((rank.host, rank.node), []).append(rank)
    return [
        TrainerPlace(
            *name,
            devices=tuple(dict.fromkeys(device for rank in found for device in rank.devices)),
            cores=max(rank.cores for rank in found),
        )
        for name, found in hosts.items()
    ]


def _visible_devices() -> tuple[str, ...]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(part.strip() for part in named.split(",") if part.strip())
    return tuple(map(str, range(torch.cuda.device_count())))
