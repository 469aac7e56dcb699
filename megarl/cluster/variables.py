"""Environment variables of the processes of a run: trainer ranks, engines, environment workers.

Libraries read most of them once, when they are loaded, and torch is loaded early: Ray unpickles an actor's
class, which imports it, before the actor's ``__init__`` runs. So the parent sets them (the launcher or Ray's
``runtime_env``), never the process itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

# The user's variables with these prefixes are forwarded to processes on other nodes.
_FORWARDED = (
    *("MEGARL_", "HF_", "NCCL_", "GLOO_", "OMP_", "GOMP_", "MKL_"),
    *("TORCH", "PYTORCH_", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("VLLM_", "WANDB_", "PYTHON", "TOKENIZERS_"),
)

_ENGINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # the actor has threads, so no fork
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer uses the same cores in turn
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "TORCH_COMPILE_DISABLE": "1",  # the sampler compiles one comparison otherwise: 7 s at the first request
    "OMP_WAIT_POLICY": "passive",  # spinning workers would take the trainer's cores
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

_SPIN_COUNT = "1000"
"""A few microseconds: about the gap between two loops of a step, so that idle cores lose nothing."""


def is_first_process() -> bool:
    """Whether this is rank 0, as the launcher's variables say: before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


def cores() -> int:
    """Return the CPU cores of this process: the smaller of its affinity and its container's quota."""
    bound = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")  # "800000 100000": 8 cores' time; "max 100000": no limit
    if not quota.is_file():
        return bound
    time, period = quota.read_text().split()
    return bound if time == "max" else min(bound, math.ceil(int(time) / int(period)))


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of ``environ`` that are forwarded to all nodes."""
    return {name: value for name, value in environ.items() if name.startswith(_FORWARDED)}


def expandable_segments(environ: Mapping[str, str]) -> str | None:
    """Return the name of the variable that enables torch's expandable segments, or None."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in environ.get(name, "").replace(" ", "").lower():
            return name
    return None


def threads(count: int) -> dict[str, str]:
    """Return the thread counts of OpenMP and of MKL, which has its own variable."""
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}


def rank_threads(environ: Mapping[str, str], num_ranks: int) -> dict[str, str]:
    """Return what each of ``num_ranks`` trainer ranks, which share this machine's cores, is told of threads.

    Their number, unless ``environ`` sets OMP_NUM_THREADS, and how long a thread spins for the others, unless
    it sets GOMP_SPINCOUNT or OMP_WAIT_POLICY. By libgomp's default it spins for milliseconds. Where another
    process has the core of the thread waited for, that triples the CPU time of a small model's step.
    """
    count = {} if "OMP_NUM_THREADS" in environ else {"OMP_NUM_THREADS": str(max(1, cores() // num_ranks))}
    waits = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(environ)
    return count if waits else {**count, "GOMP_SPINCOUNT": _SPIN_COUNT}


def engine_variables(num_threads: int, *, batch_invariant: bool = False) -> dict[str, str]:
    """Return the variables of an engine process and its workers, with ``num_threads`` threads each."""
    invariant = {"VLLM_BATCH_INVARIANT": "1"} if batch_invariant else {}
    return {**_ENGINE, **invariant, **threads(num_threads)}


def environment_worker_variables() -> dict[str, str]:
    """Return the variables of environment workers, which use one thread each."""
    return threads(1)
