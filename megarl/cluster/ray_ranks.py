"""`launcher: ray`: trainer ranks on the nodes of a Ray cluster, one actor of a placement group each.

An actor starts its rank as a subprocess (``python -m megarl.cli`` with RANK, WORLD_SIZE ...), as torchrun or
srun would, forwards signals and output, and exits with it; the rank does not use Ray for this. RAY_ADDRESS
selects the cluster, whose nodes may join at any time; without it this machine is the cluster.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.cluster.processes import die_with_parent
from megarl.cluster.ray_runtime import ADDRESS_VARIABLE, NODE_VARIABLE, connect_ray, started_here, stop_ray
from megarl.cluster.variables import forwarded, rank_threads
from megarl.errors import UserError

_WAIT_LINE_SECONDS = 30.0
_GONE_EXIT_CODE = -signal.SIGKILL  # the rank of a dead actor is killed too


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Node, address and GPUs of an actor."""

    node_id: str
    address: str  # reachable from other nodes
    devices: tuple[int, ...]  # GPUs assigned by Ray, empty on a CPU


class RankActor:
    """Ray actor that runs the process of one rank. Its methods are called on several threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def place(self) -> RankPlace:
        """Return the placement of this actor."""
        import ray

        context = ray.get_runtime_context()
        devices = context.get_accelerator_ids().get("GPU", [])
        return RankPlace(context.get_node_id(), ray.util.get_node_ip_address(), tuple(map(int, devices)))

    def free_port(self) -> int:
        """Return a free port of this node."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], folder: str) -> int:
        """Start the rank in ``folder``; return its process id."""
        inherited = {name: value for name, value in os.environ.items() if not _is_rays_own(name)}
        threads = rank_threads(environment, int(environment["LOCAL_WORLD_SIZE"]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megarl.cli", *arguments],
            env={**inherited, **threads, **environment},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        return self._process.pid

    def output(self) -> Iterator[bytes]:
        """Yield the output of the rank as it is printed."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while chunk := os.read(descriptor, 65536):
            yield chunk

    def wait(self) -> int:
        """Wait for the rank; return its exit code (-n after signal n)."""
        assert self._process is not None
        return self._process.wait()

    def send_signal(self, number: int) -> None:
        """Forward a signal to the rank."""
        if self._process is not None:
            self._process.send_signal(number)


class RayRank:
    """One rank as the launcher sees it; implements :class:`megarl.launch.RankProcess`."""

    def __init__(self, actor: Any, pid: int) -> None:
        self.pid = pid
        self._actor = actor
        self._code: int | None = None
        self._ended: Any = actor.wait.remote()
        self._printer = threading.Thread(target=self._print, daemon=True)
        self._printer.start()

    def poll(self) -> int | None:
        """Return its exit code, None while it runs; that of SIGKILL if its actor or node has died."""
        import ray
        from ray.exceptions import RayError

        if self._code is None and ray.wait([self._ended], timeout=0)[0]:
            try:
                self._code = ray.get(self._ended)
            except RayError:
                self._code = _GONE_EXIT_CODE
            self._printer.join(5)
        return self._code

    def send_signal(self, number: int) -> None:
        """Forward a signal; SIGKILL kills the actor, and with it the rank."""
        import ray

        if self.poll() is not None:
            return
        if number == signal.SIGKILL:
            ray.kill(self._actor, no_restart=True)  # its rank dies with it
        else:
            self._actor.send_signal.remote(number)

    def _print(self) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            for chunk in self._actor.output.options(num_returns="streaming").remote():
                sys.stdout.buffer.write(ray.get(chunk))
                sys.stdout.buffer.flush()
        except RayError:  # poll() reports it
            return


def start_ranks(num_ranks: int, arguments: Sequence[str], signalled: Sequence[int] = ()) -> list[RayRank]:
    """Place ``num_ranks`` actors, with a GPU each if the cluster has GPUs, else a core; start the ranks.

    Ranks of a node have consecutive numbers, in the order of their GPUs. Returns when all have started, or []
    if a signal arrives (``signalled`` is not empty) while waiting for nodes.

    Raises:
        UserError: the cluster of RAY_ADDRESS does not answer, or this machine has too few GPUs.
    """
    import ray

    address = connect_ray(num_ranks)
    on_gpu = _wants_gpus()
    found = int(ray.cluster_resources().get("GPU", 0))
    if on_gpu and started_here() and found < num_ranks:  # no node joins a local Ray
        raise UserError(
            f"parallel.num_processes: {num_ranks} ranks, but this machine's Ray has {found} GPUs; name a "
            "cluster in RAY_ADDRESS, or place ranks on cores with MEGARL_PLATFORM=cpu"
        )
    actors = _place(num_ranks, "GPU" if on_gpu else "CPU", signalled)
    if not actors:
        return []
    places: list[RankPlace] = ray.get([actor.place.remote() for actor in actors])
    order = sorted(
        range(num_ranks), key=lambda i: (*_node_order(places)[places[i].node_id], places[i].devices)
    )
    actors, places = [actors[i] for i in order], [places[i] for i in order]
    port = ray.get(actors[0].free_port.remote())
    nodes = [place.node_id for place in places]
    print(f"Ray: {num_ranks} ranks on {len(set(nodes))} node{'s' if len(set(nodes)) > 1 else ''}, {address}")
    starts = []
    for rank, (actor, place) in enumerate(zip(actors, places, strict=True)):
        local = nodes[:rank].count(place.node_id)
        here = [p for p in places if p.node_id == place.node_id]
        environment = {
            **forwarded(os.environ),
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(len(here)),
            "MASTER_ADDR": places[0].address,
            "MASTER_PORT": str(port),
            ADDRESS_VARIABLE: address,
            NODE_VARIABLE: place.node_id,
        }
        if on_gpu:  # all GPUs of the node: LOCAL_RANK indexes them, and engines need those of other ranks
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(d) for p in here for d in p.devices)
        starts.append(actor.start.remote(list(arguments), environment, str(Path.cwd())))
    return [RayRank(actor, pid) for actor, pid in zip(actors, ray.get(starts), strict=True)]


def _wants_gpus() -> bool:
    """Return whether ranks are placed on GPUs, even if no node with GPUs has joined yet."""
    import ray

    if os.environ.get("MEGARL_PLATFORM") == "cpu":
        return False
    import torch

    return torch.version.cuda is not None and (not started_here() or bool(ray.cluster_resources().get("GPU")))


def _place(num_ranks: int, resource: str, signalled: Sequence[int]) -> list[Any]:
    """Wait until enough nodes have joined; return actors in a placement group."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{resource: 1}] * num_ranks, strategy="PACK")
    began = said = time.monotonic()
    while not group.wait(1):
        if signalled:
            return []
        now = time.monotonic()
        if now - said > _WAIT_LINE_SECONDS or said == began:
            said = now
            there = int(ray.cluster_resources().get(resource, 0))
            free = int(ray.available_resources().get(resource, 0))
            hint = "; MEGARL_PLATFORM=cpu places ranks on cores" if resource == "GPU" else ""
            print(
                f"Ray: waiting for {num_ranks} {resource}s; {there} have joined, {free} of them are free "
                f"({now - began:.0f} s{hint})",
                flush=True,
            )
    actor_class: Any = ray.remote(RankActor)
    return [
        actor_class.options(
            num_cpus=1 if resource == "CPU" else 0,
            num_gpus=1 if resource == "GPU" else 0,
            max_restarts=0,
            max_concurrency=8,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote()
        for index in range(num_ranks)
    ]


def _node_order(places: Sequence[RankPlace]) -> dict[str, tuple[int, str]]:
    """Order nodes with this machine's first, since rank 0 writes the run directory and the terminal."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return {place.node_id: (place.node_id != here, place.node_id) for place in places}


def _is_rays_own(name: str) -> bool:
    """Return whether a variable belongs to the Ray worker and must not reach the rank.

    Credentials (RAY_AUTH_*) must: a rank joins the cluster by its address. Ray sets OMP_NUM_THREADS for an
    actor that does not compute.
    """
    return name == "OMP_NUM_THREADS" or (name.startswith("RAY_") and not name.startswith("RAY_AUTH_"))


__all__ = ["RankActor", "RankPlace", "RayRank", "start_ranks", "stop_ray"]
