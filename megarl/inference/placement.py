"""Placement of engines: the node and GPUs of each, chosen near the trainer ranks whose memory it aliases."""

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
    """Location of one trainer rank, or of all ranks of a host in rank order."""

    host: str  # id of megarl.weights.memory_domain
    node: str  # Ray's node id, "" if Ray has not started the ranks
    devices: tuple[str, ...]  # GPUs, as CUDA_VISIBLE_DEVICES names them; empty on a CPU
    cores: int  # CPU cores that one rank may use


@dataclass(frozen=True, slots=True)
class EnginePlace:
    """Placement of an engine. Its ranks run on the first of ``devices`` and can read the others."""

    node: str = ""  # Ray's node id; "" is the driver's
    devices: str = ""  # in the form of CUDA_VISIBLE_DEVICES; "": those visible to the driver
    cores: int = 0  # CPU cores for it alone while it generates; 0: all that the driver may use


BESIDE_DRIVER = EnginePlace()


def this_rank() -> TrainerPlace:
    """Return this trainer rank's location, with its training GPU; call ``platform.install`` first."""
    device = platform.current().device
    devices = () if device.type == "cpu" else (_visible_devices()[device.index],)
    return TrainerPlace(host_id(), os.environ.get(NODE_VARIABLE, ""), devices, cores())


def this_machine() -> TrainerPlace:
    """Return this process's location with every visible GPU, for a trainer of one process."""
    devices = () if platform.chosen_name() == "cpu" else _visible_devices()
    return TrainerPlace(host_id(), os.environ.get(NODE_VARIABLE, ""), devices, cores())


def place_engines(
    engine: EngineConfig, ranks: Sequence[TrainerPlace], *, while_training: bool = False
) -> list[EnginePlace]:
    """Place each engine: hosts in rank order, equally many per host, near the host's first ranks.

    A single engine stays with the driver, whatever ``ranks`` are. Engines that generate ``while_training``
    leave half of the cores to the trainer.

    Raises:
        UserError: the number of engines is no multiple of the number of hosts, a host has too few GPUs, or
        Ray
            does not manage the other hosts.
    """
    count, size = engine.data_parallel_size, engine.tensor_parallel_size
    if count == 1:
        return [EnginePlace(cores=max(1, cores() // 2))] if while_training else [BESIDE_DRIVER]
    hosts = _hosts(ranks)
    if count % len(hosts):
        raise UserError(
            f"{_FIELD}: {count} engines cannot be distributed evenly over the {len(hosts)} hosts of the "
            f"trainer; set 1 or a multiple of {len(hosts)}"
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
    """Return the number of CPU threads of each rank of an engine at ``place``."""
    return max(1, (config.num_threads or place.cores or cores()) // config.tensor_parallel_size)


def _hosts(ranks: Sequence[TrainerPlace]) -> list[TrainerPlace]:
    """Merge ranks into hosts, in the order of their first ranks."""
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
