"""Environment variables that libraries read once, by their effect in running processes of each kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from megarl.cluster import variables
from megarl.cluster.ray_runtime import ADDRESS_VARIABLE, with_variables
from megarl.cluster.variables import cores, forwarded
from megarl.launch import adopt_slurm
from tests.inference.conftest import _make_model
from tests.processes import command_line

# Stands in for the command line in the ranks: `python -m megarl.cli` finds this package first.
RANK_PROGRAM = """
import json, os, pathlib, sys, torch
names = ("RANK", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "MEGARL_RAY_NODE")
found = {name: os.environ.get(name) for name in names}
found["threads"] = torch.get_num_threads()
if address := os.environ.get("MEGARL_RAY_ADDRESS"):
    import ray
    from ray._private import ray_constants
    ray_constants.ENABLE_RAY_CLUSTER = not address.startswith("127.")  # as start_ray does in a rank
    ray.init(address=address, log_to_driver=False)
    found["answer"] = ray.get(ray.remote(num_cpus=0)(lambda: 42).remote())
pathlib.Path(sys.argv[1], f"rank{found['RANK']}.json").write_text(json.dumps(found))
"""

# The steps of a driver under `megarl`, without a run; prints one line of JSON.
DRIVER = """
import json, os, sys
from pathlib import Path
import ray
from megarl.cluster.ray_runtime import stop_ray

def threads(actor):
    def read(body):
        import torch
        return torch.get_num_threads()
    return ray.get(actor.__ray_call__.remote(read), timeout=300)

"""
ENGINE_DRIVER = """
from megarl.config.rollout import EngineConfig
from megarl.inference.vllm.engine import VllmEngine

def on_engine_thread(body):
    import torch
    return body._on_engine_thread(torch.get_num_threads)

def environment(body):
    return dict(os.environ)

def children(body):
    import psutil
    return [child.pid for child in psutil.Process().children(recursive=True)]

engine = VllmEngine.start(
    Path(sys.argv[1]), EngineConfig(kv_cache_gib=0.05, **json.loads(sys.argv[2])),
    dtype="float32", max_model_len=256, seed=1,
)
engine.wait_ready()
found = {"threads": threads(engine._process.actor)}
for read in (on_engine_thread, environment, children):
    found[read.__name__] = ray.get(engine._process.actor.__ray_call__.remote(read))
print(json.dumps(found), flush=True)
sys.stdin.read()
engine.shutdown()
stop_ray()
"""
WORKERS_DRIVER = """
from megarl.config.data import JsonlSource
from megarl.config.environments import EnvironmentRuntime
from megarl.environments.remote import EnvironmentWorkers

source = JsonlSource(source="jsonl", path="unread.jsonl")
workers = EnvironmentWorkers(source, "data.train", EnvironmentRuntime(num_workers=2), str)
workers.wait_ready()
print(json.dumps([threads(worker.actor) for worker in workers.processes]), flush=True)
workers.shutdown()
stop_ray()
"""


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment, without the tests' thread limit."""
    names = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "RAY_ADDRESS"}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {name: value for name, value in changes.items() if value is not None}


def start(program: str, *arguments: str, **changes: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER + program, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(**changes), stdin=pipe, stdout=pipe, text=True)


def answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=120)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("config", "threads"), [({}, cores()), pytest.param({"num_threads": 1}, 1, marks=pytest.mark.slow)]
)
def test_an_engine_computes_with_its_threads(tmp_path: Path, config: dict[str, int], threads: int) -> None:
    """Whatever number the driver uses, under a launcher or a shell that sets one."""
    _make_model("llama", tmp_path)
    driver = start(ENGINE_DRIVER, str(tmp_path), json.dumps(config), OMP_NUM_THREADS=str(3 - threads))
    found = answer(driver)
    end(driver)
    assert found["threads"] == found["on_engine_thread"] == threads
    expected = variables.engine_variables(threads)
    assert {name: found["environment"].get(name) for name in expected} == expected


@pytest.mark.slow
def test_workers_of_an_engine_divide_its_threads(tmp_path: Path) -> None:
    _make_model("llama", tmp_path)
    config = {"num_threads": 6, "tensor_parallel_size": 2}
    driver = start(ENGINE_DRIVER, str(tmp_path), json.dumps(config))
    found = answer(driver)
    workers = [psutil.Process(pid) for pid in found["children"]]
    ranks = [worker for worker in workers if "Worker" in command_line(worker)]
    assert len(ranks) == 2, [command_line(worker) for worker in workers]
    # A process's environment as it began: before its interpreter loaded anything.
    assert [worker.environ()["OMP_NUM_THREADS"] for worker in ranks] == ["3", "3"]
    end(driver)


def test_environment_workers_compute_on_one_thread() -> None:
    driver = start(WORKERS_DRIVER, OMP_NUM_THREADS="3", MKL_NUM_THREADS="3")
    assert answer(driver) == [1, 1]
    end(driver)


def run_ranks(folder: Path, how: str, num_ranks: int, **changes: str) -> list[dict[str, Any]]:
    """Return each rank's findings."""
    package = folder / "ranks" / "megarl"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(RANK_PROGRAM)
    script = f"""
        import os, sys
        from megarl import launch
        if {how!r} == "run_ranks_on_ray":
            from megarl.cluster.ray_runtime import start_ray
            start_ray({num_ranks})  # before its workers could take the ranks' program for MegaRL
        os.environ["PYTHONPATH"] = {str(folder / "ranks")!r}
        os.chdir({str(folder)!r})
        sys.exit(launch.{how}({num_ranks}, [{str(folder)!r}]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.mark.parametrize(("how", "num_ranks"), [("run_ranks", 1), ("run_ranks", 2), ("run_ranks_on_ray", 1)])
def test_ranks_share_the_cores(tmp_path: Path, how: str, num_ranks: int) -> None:
    found = run_ranks(tmp_path, how, num_ranks)
    assert [rank["threads"] for rank in found] == [max(1, cores() // num_ranks)] * num_ranks
    assert [rank["GOMP_SPINCOUNT"] for rank in found] == ["1000"] * num_ranks


def test_ranks_join_the_ray_that_was_started_for_them(tmp_path: Path) -> None:
    """It requires a token to join: without RAY_ADDRESS Ray enables that."""
    for rank in run_ranks(tmp_path, "run_ranks_on_ray", 2, OMP_NUM_THREADS="3"):
        assert rank["MEGARL_RAY_NODE"] and rank["answer"] == 42
        assert rank["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_how_threads_wait_is_the_persons_choice(name: str) -> None:
    assert variables.rank_threads({name: "set", "OMP_NUM_THREADS": "3"}, 1) == {}


def test_a_rank_under_srun_gets_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "26"}
    step |= {"SLURM_STEP_NODELIST": "a,b", "SLURM_CPUS_ON_NODE": "96", "SLURM_STEP_TASKS_PER_NODE": "8(x3),2"}

    def threads(cores: int, **changes: str) -> str:
        monkeypatch.setattr(variables.os, "sched_getaffinity", lambda _: range(cores))
        environ = step | changes
        adopt_slurm(environ)
        return environ["OMP_NUM_THREADS"]

    assert threads(96) == "12"  # --cpu-bind=none
    assert threads(12) == "12"  # bound
    assert threads(1) == "1"  # bound, without --cpus-per-task
    assert threads(96, OMP_NUM_THREADS="5") == "5"


def test_what_a_person_sets_reaches_other_nodes() -> None:
    set_here = {
        "NCCL_DEBUG": "INFO",
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "PYTORCH_ALLOC_CONF": "a:b",
        "MKL_X": "1",
    }
    assert forwarded({**set_here, "RANK": "0", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "1"}) == set_here


def test_actors_on_a_cluster_start_with_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a worker inherits from its node, not from the requesting rank; its own settings win."""
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    assert with_variables({"A": "1"}) == {"runtime_env": {"env_vars": {"A": "1"}}}
    monkeypatch.setenv(ADDRESS_VARIABLE, "10.0.0.1:6379")
    found = with_variables(variables.engine_variables(5))["runtime_env"]["env_vars"]
    assert (found["NCCL_DEBUG"], found["OMP_NUM_THREADS"]) == ("INFO", "5")
