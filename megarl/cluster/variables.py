"""Environment variables of the processes of a run: trainer ranks, engines, environment workers.

Libraries read most of them once, when they are loaded, and torch is loaded early: Ray unpickles an actor's
class, which imports it, before the actor's ``__init__`` runs. So they are set by whoever starts the process,
the launcher or Ray's ``runtime_env``, and never by the process itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

# What a person sets for a run reaches its processes on other nodes too.
_FORWARDED = (
    *("MEGARL_", "HF_", "NCCL_", "GLOO_", "OMP_", "MKL_", "TORCH", "PYTORCH_", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("VLLM_", "WANDB_", "PYTHON", "TOKENIZERS_"),
)

_ENGINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # of tensor-parallel workers: the actor has threads
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer uses the same cores, in turns
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "TORCH_COMPILE_DISABLE": "1",  # the sampler compiles one comparison otherwise: 7 s at the first request
    "OMP_WAIT_POLICY": "passive",  # spinning workers would take the trainer's cores
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def cores() -> int:
    """CPU cores that this process may use; fewer than it is bound to where a container gets less time."""
    bound = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")  # "800000 100000": 8 cores' time; "max 100000": no limit
    if not quota.is_file():
        return bound
    time, period = quota.read_text().split()
    return bound if time == "max" else min(bound, math.ceil(int(time) / int(period)))


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """Of ``environ``, what the processes of the run should see on every node."""
    return {name: value for name, value in environ.items() if name.startswith(_FORWARDED)}


def expandable_segments(environ: Mapping[str, str]) -> str | None:
    """The variable that has torch allocate a GPU's memory in expandable segments; None without one."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in environ.get(name, "").replace(" ", "").lower():
            return name
    return None


def threads(count: int) -> dict[str, str]:
    """Threads of OpenMP and of MKL, which would prefer its own variable."""
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def rank_threads(environ: Mapping[str, str], num_ranks: int) -> dict[str, str]:
    """Threads of one of the ``num_ranks`` trainer ranks on this machine, which share its cores.

    Empty where ``environ`` says how many: as many per rank as there are cores would slow all of them down.
    """
    return {} if "OMP_NUM_THREADS" in environ else {"OMP_NUM_THREADS": str(max(1, cores() // num_ranks))}


def engine_variables(num_threads: int, *, batch_invariant: bool = False) -> dict[str, str]:
    """Of an engine's process and its workers, with ``num_threads`` threads each."""
    invariant = {"VLLM_BATCH_INVARIANT": "1"} if batch_invariant else {}
    return {**_ENGINE, **invariant, **threads(num_threads)}


def environment_worker_variables() -> dict[str, str]:
    """Of the processes in which environments judge: there are several, and none computes in parallel."""
    return threads(1)
