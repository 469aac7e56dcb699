"""Placement of engines near trainer ranks: nodes and devices of imaginary hosts."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
import ray

from megarl.cluster.ray_runtime import (
    NODE_VARIABLE,
    beside_ranks,
    connect_ray,
    start_ray,
    stop_ray,
    unlink_on_node,
)
from megarl.config.rollout import EngineConfig
from megarl.errors import UserError
from megarl.inference import placement
from megarl.inference.placement import (
    EnginePlace,
    TrainerPlace,
    place_engines,
    this_machine,
    threads_per_rank,
)


def engines(count: int, size: int = 1) -> EngineConfig:
    return EngineConfig(data_parallel_size=count, tensor_parallel_size=size)


def ranks(hosts: int, devices: int, *, by_ray: bool = True, on_gpu: bool = True) -> list[TrainerPlace]:
    """A rank per GPU, hosts one after the other."""
    return [
        TrainerPlace(f"host{h}", f"node{h}" if by_ray else "", (str(d),) if on_gpu else (), 16)
        for h in range(hosts)
        for d in range(devices)
    ]


def test_one_engine_is_beside_the_driver_whatever_there_is() -> None:
    assert place_engines(engines(1, 8), ranks(4, 8, by_ray=False)) == [EnginePlace()]
    assert place_engines(engines(1), []) == [EnginePlace()]


def test_an_engine_per_host() -> None:
    places = place_engines(engines(4, 8), ranks(4, 8))
    assert places == [EnginePlace(f"node{h}", "0,1,2,3,4,5,6,7", 16) for h in range(4)]


def test_engines_of_a_host_have_their_own_devices_first_and_see_the_others() -> None:
    places = place_engines(engines(4, 2), ranks(2, 4))
    assert places == [
        EnginePlace("node0", "0,1,2,3", 8),
        EnginePlace("node0", "2,3,0,1", 8),
        EnginePlace("node1", "0,1,2,3", 8),
        EnginePlace("node1", "2,3,0,1", 8),
    ]


def test_one_host_needs_no_ray_cluster() -> None:
    places = place_engines(engines(2, 2), ranks(1, 4, by_ray=False))
    assert places == [EnginePlace("", "0,1,2,3", 8), EnginePlace("", "2,3,0,1", 8)]
    assert place_engines(engines(2), ranks(1, 1, by_ray=False, on_gpu=False)) == [EnginePlace("", "", 8)] * 2


def test_two_nodes_of_one_machine_share_its_cores() -> None:
    there = [TrainerPlace("host", "left", (), 16), TrainerPlace("host", "right", (), 16)]
    assert place_engines(engines(2), there) == [EnginePlace("left", "", 8), EnginePlace("right", "", 8)]


@pytest.mark.parametrize(
    ("num_threads", "size", "on_host", "while_training", "expected"),
    [
        (None, 1, 1, False, 16),
        (None, 2, 1, False, 8),
        (None, 2, 2, False, 4),
        (6, 2, 4, False, 3),  # as it is told
        (None, 4, 8, False, 1),  # at least one
        (None, 1, 1, True, 8),  # the trainer is at work too
        (None, 2, 2, True, 2),
        (None, 4, 8, True, 1),
    ],
)
def test_engines_share_the_cores_of_their_host(
    monkeypatch: pytest.MonkeyPatch,
    num_threads: int | None,
    size: int,
    on_host: int,
    while_training: bool,
    expected: int,
) -> None:
    monkeypatch.setattr(placement, "cores", lambda: 16)  # of the driver, for a single engine
    config = EngineConfig(num_threads=num_threads, tensor_parallel_size=size, data_parallel_size=on_host)
    places = place_engines(config, ranks(1, 1, on_gpu=False), while_training=while_training)
    assert [threads_per_rank(config, place) for place in places] == [expected] * on_host


@pytest.mark.parametrize(
    ("engine", "there", "message"),
    [
        (
            engines(3),
            ranks(2, 4),
            "3 engines cannot be distributed evenly over the 2 hosts of the trainer; set 1 or a multiple of "
            "2",
        ),
        (engines(2), ranks(2, 4, by_ray=False), "2 engines on 2 hosts need `launcher: ray`"),
        (engines(4, 4), ranks(2, 4), "2 engines with .* = 4 on a host need 8 GPUs, its trainer has 4"),
    ],
)
def test_what_cannot_be_placed_is_refused(
    engine: EngineConfig, there: list[TrainerPlace], message: str
) -> None:
    with pytest.raises(UserError, match=f"rollout.engine.data_parallel_size: {message}"):
        place_engines(engine, there)


def test_gpus_are_called_as_cuda_visible_devices_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.platform, "chosen_name", lambda: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8932f937,7")
    monkeypatch.setenv(NODE_VARIABLE, "node")
    assert this_machine().devices == ("5", "GPU-8932f937", "7")
    assert this_machine().node == "node"


def test_an_actor_sees_the_devices_it_was_placed_on() -> None:
    """In a Ray started here, whose workers have inherited the driver's visible devices."""

    class Asks:
        def devices(self) -> str | None:
            return os.environ.get("CUDA_VISIBLE_DEVICES")

    start_ray()
    try:
        actor = ray.remote(Asks).options(num_cpus=0, **beside_ranks(devices="2,3,0,1")).remote()
        assert ray.get(actor.devices.remote(), timeout=120) == "2,3,0,1"
    finally:
        stop_ray()


@pytest.mark.slow
def test_another_node_runs_an_actor_and_removes_its_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    class Asks:
        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    segment = Path("/dev/shm") / f"psm_{uuid.uuid4().hex}"
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        connect_ray(1)
        here = ray.get_runtime_context().get_node_id()
        [there] = [node["NodeID"] for node in ray.nodes() if node["NodeID"] != here]
        for node, options in ((here, beside_ranks()), (there, beside_ranks(there))):
            actor = ray.remote(Asks).options(num_cpus=0, **options).remote()
            assert ray.get(actor.node.remote(), timeout=120) == node
        segment.touch()
        unlink_on_node([segment.name, "psm_gone_already"], there)
        assert not segment.exists()
    finally:
        stop_ray()
        cluster.shutdown()
        segment.unlink(missing_ok=True)
