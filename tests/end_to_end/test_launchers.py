"""One configuration under every launcher learns the same: torchrun, srun, Ray and `megarl` alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.conftest import FinishedRun
from tests.end_to_end.harness import GRPO, ROOT, SFT, Command, column, read_steps, run, write_config
from tests.processes import command_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SFT_STEPS, GRPO_STEPS = 8, 2


def sft_config(folder: Path, model: Path, **parallel: Any) -> Path:
    return write_config(
        folder / "sft.yaml",
        SFT,
        run_dir=folder / "run",
        model=model,
        training={"num_steps": SFT_STEPS},
        parallel=parallel,
        checkpoint={"export_hf": False},
    )


def grpo_config(folder: Path, model: Path, **parallel: Any) -> Path:
    return write_config(
        folder / "grpo.yaml",
        GRPO,
        run_dir=folder / "run",
        model=model,
        training={"num_steps": GRPO_STEPS},
        parallel=parallel,
        evaluation={"at_start": False, "at_end": False},
        checkpoint={"interval": 0, "export_hf": False},
    )


def learned(folder: Path) -> list[list[float]]:
    """Return the results that must not depend on the launcher, bit for bit."""
    steps = read_steps(folder / "run")
    names = [name for name in ("loss", "grad_norm", "lr", "reward_mean", "num_tokens") if name in steps[0]]
    return [column(folder / "run", name) for name in names]


@pytest.fixture(scope="module")
def sft_alone(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[list[float]]:
    folder = tmp_path_factory.mktemp("sft_alone")
    run("sft", "--config", sft_config(folder, model, num_processes=2), output=folder / "log")
    return learned(folder)


@pytest.fixture(scope="module")
def grpo_alone(tmp_path_factory: pytest.TempPathFactory, sft_run: FinishedRun) -> list[list[float]]:
    folder = tmp_path_factory.mktemp("grpo_alone")
    run("grpo", "--config", grpo_config(folder, sft_run.dir / "hf", num_processes=2), output=folder / "log")
    return learned(folder)


def torchrun(job: str, config: Path, output: Path, size: int = 2) -> None:
    """Run with a configuration of another world size; torchrun's is used."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port"]
    with output.open("w") as stream:
        ended = subprocess.run(
            [*command, "29517", "-m", "megarl", job, "--config", str(config)],
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=1500,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert ended.returncode == 0, output.read_text()


def test_torchrun_sft(tmp_path: Path, model: Path, sft_alone: list[list[float]]) -> None:
    torchrun("sft", sft_config(tmp_path, model), tmp_path / "log")
    assert learned(tmp_path) == sft_alone


def test_torchrun_grpo(tmp_path: Path, sft_run: FinishedRun, grpo_alone: list[list[float]]) -> None:
    torchrun("grpo", grpo_config(tmp_path, sft_run.dir / "hf"), tmp_path / "log")
    assert learned(tmp_path) == grpo_alone


def test_srun_sft(tmp_path: Path, model: Path, sft_alone: list[list[float]]) -> None:
    """Two processes with the variables srun sets."""
    config = sft_config(tmp_path, model)
    step = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "1", "SLURM_NTASKS": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megarl", "sft", "--config", str(config)],
            cwd=ROOT,
            stdout=(tmp_path / f"log{rank}").open("w"),
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                **step,
                "OMP_NUM_THREADS": "1",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_STEP_NODELIST": "localhost",
            },
        )
        for rank in range(2)
    ]
    assert [rank.wait(1500) for rank in ranks] == [0, 0], (tmp_path / "log0").read_text()
    assert learned(tmp_path) == sft_alone


def test_ray_sft_on_this_machine(tmp_path: Path, model: Path, sft_alone: list[list[float]]) -> None:
    """Without a cluster, this machine is one."""
    config = sft_config(tmp_path, model, num_processes=2)
    output = run("sft", "--config", config, "launcher=ray", output=tmp_path / "log")
    assert "Ray: 2 ranks on 1 node" in output
    assert f"Report: {tmp_path}" in output  # what rank 0 prints arrives here
    assert learned(tmp_path) == sft_alone


def test_ray_grpo_on_this_machine(
    tmp_path: Path, sft_run: FinishedRun, grpo_alone: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 joins the Ray that was started for the ranks, which wants a token; its engine is there."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = grpo_config(tmp_path, sft_run.dir / "hf", num_processes=2)
    output = run("grpo", "--config", config, "launcher=ray", output=tmp_path / "log")
    assert "Ray: 2 ranks on 1 node" in output
    assert learned(tmp_path) == grpo_alone


@pytest.fixture
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray node with ``request.param`` cores; more can be added."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": request.param, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_ray_sft_on_two_nodes(tmp_path: Path, model: Path, sft_run: FinishedRun, cluster: Any) -> None:
    """Four ranks, pipeline by data parallel; the second node joins when the command already waits for it."""
    layout = {"num_processes": 4, "pipeline_parallel_size": 2}
    config = sft_config(tmp_path, model, **layout)
    command = Command("sft", "--config", config, "launcher=ray", output=tmp_path / "log")
    try:
        command.wait_until(lambda: "Ray: waiting for 4 CPUs; 2 have joined" in command.output)
        cluster.add_node(num_cpus=2)
        assert command.wait() == 0, command.output
    finally:
        command.kill()
    assert "Ray: 4 ranks on 2 nodes" in command.output
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        ours, alone = column(tmp_path / "run", name), column(sft_run.dir, name)[:SFT_STEPS]
        assert ours == pytest.approx(alone, abs=tolerance)


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_ray_grpo_on_two_nodes(
    tmp_path: Path, sft_run: FinishedRun, grpo_alone: list[list[float]], cluster: Any
) -> None:
    """A rank per node; the one engine is on rank 0's, whose memory it aliases."""
    cluster.add_node(num_cpus=1)
    config = grpo_config(tmp_path, sft_run.dir / "hf", num_processes=2)
    output = run("grpo", "--config", config, "launcher=ray", output=tmp_path / "log")
    assert "Ray: 2 ranks on 2 nodes" in output
    assert "parameters are the trainer's memory" in output
    assert learned(tmp_path) == grpo_alone
    assert all(step["weights_bytes_moved"] == 0 for step in read_steps(tmp_path / "run"))


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_ray_grpo_with_an_engine_per_node(
    tmp_path: Path, sft_run: FinishedRun, grpo_alone: list[list[float]], cluster: Any
) -> None:
    """A rank and an engine per node; three engines are refused before any starts."""
    cluster.add_node(num_cpus=1)
    config = grpo_config(tmp_path, sft_run.dir / "hf", num_processes=2)
    size = "rollout.engine.data_parallel_size"
    refused = Command("grpo", "--config", config, "launcher=ray", f"{size}=3", output=tmp_path / "refused")
    assert refused.wait(300) == 2
    assert refused.output.count(f"{size}: 3 engines cannot be distributed evenly over the 2 hosts") == 1, (
        refused.output
    )
    assert not list((tmp_path / "run").glob("engine*.log"))

    def engines() -> set[int]:
        """The raylets whose engines run."""
        family = psutil.Process().children(recursive=True)
        return {process.ppid() for process in family if "EngineActor" in command_line(process)}

    command = Command("grpo", "--config", config, "launcher=ray", f"{size}=2", output=tmp_path / "log")
    try:
        command.wait_until(lambda: read_steps(tmp_path / "run"))
        assert len(engines()) == 2, "on a node each"
        assert command.wait() == 0, command.output
    finally:
        command.kill()
    assert "Ray: 2 ranks on 2 nodes" in command.output
    assert learned(tmp_path) == grpo_alone
    assert all(step["weights_bytes_moved"] == 0 for step in read_steps(tmp_path / "run"))
