"""One local Ray runtime per driver process: started quietly, tied to the driver's life.

Ray's own processes get the kernel's parent-death signal from ``ray.init`` and end with the thread
that called it, so :func:`start_ray` belongs on the main thread. Workers end when their raylet does;
its two agents would stay for a minute or more to report to a head that is gone, so a reaper ends them.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

# Records cross by value and weights not at all, so the object store only needs Ray's minimum comfort.
OBJECT_STORE_BYTES = 128 * 2**20
_DIR_PREFIX = "megarl-ray-"
# Unix socket paths end at 107 bytes, and Ray's session directory takes about 75 of them.
_MAX_TEMP_ROOT = 30


@dataclass(frozen=True, slots=True)
class _Session:
    temp_dir: Path
    reaper: subprocess.Popen[bytes]


_sessions: list[_Session] = []  # one while Ray runs


def start_ray() -> None:
    """Start this driver's own Ray on this machine; does nothing when it runs already."""
    import ray

    if _sessions:
        return
    _remove_stale_dirs()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray's default of 15 leaves an engine a few percent of a core that anything else wants too.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # leave CUDA_VISIBLE_DEVICES to the engine
    temp_dir = tempfile.mkdtemp(prefix=f"{_DIR_PREFIX}{os.getpid()}-", dir=_temp_root())
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",  # not a cluster that RAY_ADDRESS names: weights need this machine's memory
        num_cpus=os.cpu_count(),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=temp_dir,
    )
    # Ray puts a crash reporter on SIGTERM, after which the driver could no longer end in order.
    signal.signal(signal.SIGTERM, handler)
    _sessions.append(_Session(Path(temp_dir), _start_reaper()))


def ray_temp_dir() -> Path:
    """Where this driver's Ray keeps its files; removed by :func:`stop_ray` or by a later driver."""
    return _sessions[0].temp_dir


def stop_ray() -> None:
    """Stop what :func:`start_ray` started and remove its files; does nothing when it does not run."""
    if not _sessions:
        return
    import ray

    session = _sessions.pop()
    session.reaper.kill()
    session.reaper.communicate()
    ray.shutdown()
    shutil.rmtree(session.temp_dir, ignore_errors=True)  # a daemon may still be writing its last log line


def _start_reaper() -> subprocess.Popen[bytes]:
    """A shell that waits for the driver's end of a pipe to close, then ends the raylet's children."""
    raylets = [child for child in psutil.Process().children() if _name(child) == "raylet"]
    pids = [str(child.pid) for raylet in raylets for child in raylet.children()]
    command = ["/bin/sh", "-c", 'read _; kill -9 "$@" 2>/dev/null', "megarl-ray-reaper", *pids]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.NoSuchProcess:  # a child of the driver that ended meanwhile
        return ""


def _temp_root() -> Path:
    root = Path(tempfile.gettempdir())
    return root if len(str(root)) <= _MAX_TEMP_ROOT else Path("/tmp")


def _remove_stale_dirs() -> None:
    """Directories of drivers that were killed before they could tidy up."""
    for path in _temp_root().glob(f"{_DIR_PREFIX}*"):
        pid = path.name.removeprefix(_DIR_PREFIX).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and path.stat().st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)
