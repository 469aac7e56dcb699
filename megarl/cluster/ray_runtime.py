"""One Ray runtime per driver process: a local one tied to the driver's life, or that of a cluster.

Ray's processes get the kernel's parent-death signal in ``ray.init`` and exit with the thread that called it,
so call :func:`start_ray` on the main thread. Workers exit with their raylet. Its two agents would keep trying
to reach the dead head for a minute or more, so a reaper kills them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from megarl.cluster.processes import unlink_shared_memory
from megarl.cluster.variables import forwarded
from megarl.errors import UserError

log = logging.getLogger(__name__)

# Records are passed by value and weights not at all, so a small object store is enough.
OBJECT_STORE_BYTES = 128 * 2**20
# Set for ranks on a Ray cluster (`launcher: ray`): its address.
ADDRESS_VARIABLE = "MEGARL_RAY_ADDRESS"
# Likewise: Ray's id of the rank's node.
NODE_VARIABLE = "MEGARL_RAY_NODE"
_DIR_PREFIX = "megarl-ray-"
_UNLINK_SECONDS = 30.0
# Unix socket paths end at 107 bytes: Ray's session directory takes 64 of them, a folder of ours 22.
_MAX_TEMP_ROOT = 20
_LOCK = ".lock"
_INNER = "r"  # Ray makes the folder that it is given 0777; the one around it stays the owner's
_FRESH_SECONDS = 60.0  # between the making of a folder and its lock


@dataclass(frozen=True, slots=True)
class _Session:
    temp_dir: Path
    lock: IO[str]  # held as long as this process lives
    reaper: subprocess.Popen[bytes] | None  # of a Ray that was started here


_sessions: list[_Session] = []  # one while Ray runs


def start_ray(num_cpus: int | None = None) -> None:
    """Start a local Ray for this driver, or join the cluster its rank was placed on.

    Does nothing if it is running. ``num_cpus`` limits the CPUs of actors; None: all cores.
    """
    if _sessions:
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # With Ray's default niceness of 15 an engine gets a few percent of a contended core.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # leave CUDA_VISIBLE_DEVICES to the engine
    temp_dir, lock = make_temp_dir()
    if address := os.environ.get(ADDRESS_VARIABLE):
        # A Ray on loopback is joined on loopback; any other node's address is kept.
        with _on_loopback() if address.startswith("127.") else nullcontext():
            _init(address=address)
        _sessions.append(_Session(temp_dir, lock, None))
        return
    with _on_loopback():
        _init(
            address="local",  # not a cluster that RAY_ADDRESS names: weights need this machine's memory
            num_cpus=num_cpus or os.cpu_count(),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=str(temp_dir / _INNER),
            job_config=_job_config(),
        )
    _end_unused_daemons()
    _sessions.append(_Session(temp_dir, lock, _start_reaper(str(temp_dir))))


class _NoPaths(list[str]):
    def extend(self, paths: Iterable[str]) -> None:
        """Takes none of them."""


def _job_config() -> Any:
    """Of workers that do not search the driver's folders before what is installed.

    A yaml.py in the current directory would be taken for the package otherwise. Objects of the user's own are
    found there all the same, after everything else (megarl.config.dotted).
    """
    from ray.job_config import JobConfig

    job_config = JobConfig()
    job_config._py_driver_sys_path = _NoPaths()  # not Ray's public interface
    return job_config


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray's servers listen on 127.0.0.1 alone: nobody joins a Ray of one machine over the network.

    ``ray.init`` turns a node's address that is given as 127.0.0.1 into the network's; the flag by which it
    decides is for systems that ask their user about every port.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # not Ray's public interface
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def connect_ray(num_cpus: int) -> str:
    """Join the cluster of RAY_ADDRESS, else start a local Ray with at least ``num_cpus`` cores.

    Returns the address of the cluster. Without RAY_ADDRESS no cluster is joined: Ray's own discovery would
    take any that runs on this machine, including those of other runs.

    Raises:
        UserError: RAY_ADDRESS is a Ray Client address, or no cluster answers there.
    """
    import ray

    named = os.environ.get("RAY_ADDRESS")
    if not named:
        start_ray(max(num_cpus, os.cpu_count() or 1))
        return str(ray.get_runtime_context().gcs_address)
    if named.startswith("ray://"):
        raise UserError(f"RAY_ADDRESS: a Ray Client (got {named}) cannot start ranks; use HOST:6379")
    try:
        _init(address=named)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"RAY_ADDRESS: no Ray cluster answers at {named} ({reason})") from error
    _sessions.append(_Session(*make_temp_dir(), None))
    return str(ray.get_runtime_context().gcs_address)


def _init(**options: Any) -> None:
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    # Ray installs a crash reporter for SIGTERM, which would prevent an orderly exit of the driver.
    signal.signal(signal.SIGTERM, handler)


def _end_unused_daemons() -> None:
    """Stop the autoscaler, the log monitor and the rest of the dashboard, 190 MiB, which are not used here.

    ``ray.init`` has no options for the first two.
    """
    from ray._private import worker

    for name in ("monitor", "log_monitor", "dashboard"):
        end = getattr(worker._global_node, f"kill_{name}", None)  # private in Ray
        if end is not None:
            end(check_alive=False)


def with_variables(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return actor options that set these environment variables.

    On a cluster, whose workers inherit nothing from this process, also the user's forwarded variables.
    """
    inherited = forwarded(os.environ) if ADDRESS_VARIABLE in os.environ else {}
    return {"runtime_env": {"env_vars": {**inherited, **variables}}}


def beside_ranks(
    node: str = "", devices: str = "", variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return options of an actor that shares memory with trainer ranks: same node, their GPUs visible.

    Args:
        node: Ray's id of the node; "": the node of this process.
        devices: in the format of CUDA_VISIBLE_DEVICES; "": those of this process.
        variables: further environment variables.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = node or ray.get_runtime_context().get_node_id()
    environment = dict(variables or {})
    seen: str | None = devices
    if not devices:  # a cluster's workers have not inherited them
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") if ADDRESS_VARIABLE in os.environ else None
    if seen is not None:
        environment |= {"CUDA_VISIBLE_DEVICES": seen, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return {"scheduling_strategy": strategy, **with_variables(environment)}


def unlink_on_node(names: list[str], node: str) -> None:
    """Remove shared memory left by killed processes on ``node`` ("": the node of this process)."""
    import ray
    from ray.exceptions import RayError

    if not node or node == ray.get_runtime_context().get_node_id():
        unlink_shared_memory(names)
    elif names:
        task: Any = ray.remote(unlink_shared_memory)
        try:
            ray.get(task.options(num_cpus=0, **beside_ranks(node)).remote(names), timeout=_UNLINK_SECONDS)
        except RayError as error:  # a dead node has no memory to free
            log.warning("Shared memory on node %s was not removed: %s", node, error)


def make_temp_dir() -> tuple[Path, IO[str]]:
    """A folder of this process's user, short enough for Ray, and the lock that says that it is in use.

    What killed processes have left is removed.
    """
    _remove_stale_dirs()
    folder = Path(tempfile.mkdtemp(prefix=_DIR_PREFIX, dir=_temp_root()))
    lock = open(folder / _LOCK, "w", encoding="utf-8")  # noqa: SIM115 (held until this process ends)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def started_here() -> bool:
    """Return whether Ray is a local one started by this driver."""
    return bool(_sessions) and _sessions[0].reaper is not None


def ray_temp_dir() -> Path:
    """Return the folder of this driver's Ray; removed by :func:`stop_ray` or by a later driver."""
    return _sessions[0].temp_dir


def stop_ray() -> None:
    """Stop Ray and remove its files; does nothing if it is not running."""
    if not _sessions:
        return
    import ray

    session = _sessions.pop()
    if session.reaper is not None:
        session.reaper.kill()
        session.reaper.communicate()
    ray.shutdown()
    shutil.rmtree(session.temp_dir, ignore_errors=True)  # a daemon may still be writing its last log line
    session.lock.close()


def _start_reaper(temp_dir: str) -> subprocess.Popen[bytes]:
    """Start a shell that waits until the driver's pipe closes, then kills the raylet's children.

    It then removes Ray's directory.
    """
    raylets = [child for child in psutil.Process().children() if _name(child) == "raylet"]
    pids = [str(child.pid) for raylet in raylets for child in raylet.children()]
    script = 'read _; folder=$1; shift; kill -9 "$@" 2>/dev/null; sleep 1; rm -rf "$folder"'
    command = ["/bin/sh", "-c", script, "megarl-ray-reaper", temp_dir, *pids]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:  # exited meanwhile
        return ""


def _temp_root() -> Path:
    root = Path(tempfile.gettempdir())
    return root if len(str(root)) <= _MAX_TEMP_ROOT else Path("/tmp")


def _remove_stale_dirs() -> None:
    """Directories of drivers that were killed before they could tidy up.

    A lock tells, not a process id: containers that share a temporary directory do not see each other's.
    """
    for path in _temp_root().glob(f"{_DIR_PREFIX}*"):
        try:
            if path.is_dir() and path.stat().st_uid == os.getuid() and _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # another driver has just removed it
            continue


def _is_abandoned(folder: Path) -> bool:
    try:
        lock = open(folder / _LOCK, "r+", encoding="utf-8")  # noqa: SIM115 (closed below)
    except FileNotFoundError:  # it is being made, or its driver was killed in that moment
        return time.time() - folder.stat().st_mtime > _FRESH_SECONDS
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
