"""Launch trainer ranks: under torchrun or srun, as local processes, or on Ray.

A rank reads RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, whoever set them. This module sets
them from Slurm's variables, or in :func:`run_ranks`, which starts the ranks of one machine. Unlike torchrun
it keeps the exit codes of the ranks (2 for a user error, 143 after SIGTERM), forwards signals exactly once
and waits for the checkpoint that follows.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from megarl.cluster import heartbeat
from megarl.cluster.processes import die_with_parent
from megarl.cluster.variables import cores, rank_threads
from megarl.errors import UserError

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# After one rank has failed, the others may hang in a collective: they get this long to exit.
_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.05


class RankProcess(Protocol):
    """A rank as its launcher sees it: a local process, or one behind a Ray actor."""

    pid: int

    def poll(self) -> int | None:
        """Return its exit code (-n after signal n), None while it runs."""
        ...

    def send_signal(self, number: int) -> None:
        """Send a signal; does nothing if the process has exited."""
        ...


def world_size(environ: Mapping[str, str]) -> int | None:
    """Return the number of ranks that a launcher has started, None without a launcher.

    Raises:
        UserError: WORLD_SIZE is not a number, or the variables that go with it are missing.
    """
    text = environ.get("WORLD_SIZE")
    if text is None:
        return None
    size = _positive(text, "WORLD_SIZE")
    missing = [name for name in _RANK_VARIABLES if name not in environ]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE is {size} but {', '.join(missing)} not set; start ranks with torchrun or srun"
        )
    for name, below in (("RANK", size), ("LOCAL_RANK", size), ("MASTER_PORT", 2**16)):
        text = environ.get(name, "0")
        if not (text.isascii() and text.isdigit() and int(text) < below):
            raise UserError(f"{name}: expected an integer below {below} (got {text[:40]!r})")
    return size


def adopt_slurm(environ: MutableMapping[str, str]) -> None:
    """Set the rank's variables from Slurm's, under `srun` with several tasks.

    Does nothing if WORLD_SIZE is set, nor in a batch script outside srun: there Slurm also sets SLURM_PROCID
    and SLURM_NTASKS but starts one process only (SLURM_STEP_ID is unset).

    Raises:
        UserError: the rendezvous host is unknown.
    """
    if "WORLD_SIZE" in environ or "SLURM_PROCID" not in environ:
        return
    in_batch_script = "SLURM_JOB_ID" in environ and not {"SLURM_STEP_ID", "SLURM_STEPID"} & environ.keys()
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    size = _positive(tasks, "SLURM_NTASKS")
    if size == 1 or in_batch_script:
        return
    if "MASTER_ADDR" not in environ:
        names = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
        nodes = next((environ[name] for name in names if environ.get(name)), None)
        if nodes is None:
            raise UserError(
                "srun: neither MASTER_ADDR nor SLURM_STEP_NODELIST is set; set MASTER_ADDR to rank 0's host"
            )
        environ["MASTER_ADDR"] = first_host(nodes)
    environ.setdefault("MASTER_PORT", str(_slurm_port(environ)))
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")
    environ["WORLD_SIZE"] = str(size)
    tasks_here = _tasks_on_node(environ)
    environ.setdefault("LOCAL_WORLD_SIZE", str(tasks_here))
    on_node = environ.get("SLURM_CPUS_ON_NODE", "")
    bound = on_node.isdigit() and cores() < int(on_node)  # Slurm binds each task to separate cores
    environ.update(rank_threads(environ, 1 if bound else tasks_here))


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    """Return the tasks of this job step on this node; '8(x3),2' is 8 on each of three nodes, then 2."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")
    tasks = [
        int(count)
        for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?(?:,|$)", text)
        for _ in range(int(nodes or 1))
    ]
    return (tasks or [1])[min(int(environ.get("SLURM_NODEID", "0")), len(tasks or [1]) - 1)]


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list, e.g. gpu007 of 'gpu[007-012,20],login1'."""
    depth, end = 0, len(nodes)
    for index, character in enumerate(nodes):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            end = index
            break
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes[:end])


def run_ranks(num_processes: int, arguments: Sequence[str], ranks_path: Path | None = None) -> int:
    """Start ``python -m megarl.cli *arguments`` once per rank on this machine and wait for all.

    SIGINT, SIGTERM and SIGHUP are forwarded to every rank once; the ranks then write a checkpoint, without a
    time limit. If a rank fails, the others are killed after a grace period, and the heartbeats in
    ``ranks_path`` give the failed rank and its last phase.

    Returns:
        The exit code of the first rank that failed (128 + n after signal n), else 0.
    """
    port = str(_free_port())

    def start(signalled: Sequence[int]) -> Iterator[RankProcess]:
        for rank in range(num_processes):
            if signalled:
                return
            yield _start_rank(rank, num_processes, port, arguments)

    return _run(start, ranks_path)


def run_ranks_on_ray(num_processes: int, arguments: Sequence[str], ranks_path: Path | None = None) -> int:
    """Run ranks as :func:`run_ranks` does, as Ray actors (:mod:`megarl.cluster.ray_ranks`)."""
    from megarl.cluster.ray_ranks import start_ranks, stop_ray

    try:
        return _run(lambda signalled: start_ranks(num_processes, arguments, signalled), ranks_path)
    finally:
        stop_ray()


def _run(start: Callable[[Sequence[int]], Iterable[RankProcess]], ranks_path: Path | None) -> int:
    """Start ranks, forward signals to them and wait for them."""
    ranks: list[RankProcess] = []
    signalled: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        signalled.append(number)
        _send(ranks, number)

    # An ignored signal stays ignored, here and in the ranks: nohup, background jobs of a shell.
    heard = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in heard}
    try:
        for rank in start(signalled):
            ranks.append(rank)
        if signalled:  # for ranks that were not in the list yet when the signal arrived
            _send(ranks, signal.SIGTERM)
        return wait_for(ranks, signalled, ranks_path)
    finally:
        _send(ranks, signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start_rank(rank: int, size: int, port: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment |= rank_threads(environment, size)
    return subprocess.Popen(
        # -P: a yaml.py or random.py in the current directory is not taken for the package.
        [sys.executable, "-P", "-m", "megarl.cli", *arguments],
        env=environment,
        start_new_session=True,  # a Ctrl-C reaches the ranks through this process only, once
        preexec_fn=die_with_parent,  # a SIGKILL here must not leave ranks writing to the run directory
    )


def wait_for(ranks: Sequence[RankProcess], signalled: Sequence[int], ranks_path: Path | None) -> int:
    """Wait for all ranks, kill the others if one fails, and return the exit code of the run."""
    failed: tuple[int, int] | None = None  # rank, exit code
    deadline: float | None = None
    while None in (codes := [rank.poll() for rank in ranks]):
        failed = failed or _first_failure(codes)
        if failed and deadline is None and not signalled:
            deadline = time.monotonic() + _GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            _send(ranks, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(_POLL_SECONDS)
    failed = failed or _first_failure(codes)
    if failed is not None and not signalled and ranks_path is not None:
        _explain_failure(ranks_path, failed[0], failed[1], [rank.pid for rank in ranks])
    code = failed[1] if failed else 0
    if not ranks and signalled:
        code = -signalled[0]
    return 128 - code if code < 0 else code


def _first_failure(codes: Sequence[int | None]) -> tuple[int, int] | None:
    return next(((rank, code) for rank, code in enumerate(codes) if code), None)


def _explain_failure(ranks_path: Path, rank: int, code: int, pids: Sequence[int]) -> None:
    """Print which rank ended the run and its last phase, unless the rank has printed an error itself."""
    if code == 2:
        return
    if (said := heartbeat.first_line(ranks_path)) is not None:  # before what the others had to say of its end
        print(f"error: {said}", file=sys.stderr)
        return
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    beat = heartbeat.read_heartbeat(ranks_path, rank)
    if beat is None or beat["pid"] not in pids:  # none, or from an earlier run
        print(f"error: rank {rank} {how} before its run began", file=sys.stderr)
    elif beat["state"] != "failed":
        heartbeat.report(ranks_path, [rank], how)
    elif len(pids) > 1:  # it has said so itself, but not last
        print(f"error: {heartbeat.explain(ranks_path, rank, how, show_traceback=False)}", file=sys.stderr)


def _send(ranks: Sequence[RankProcess], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)  # does nothing for a rank that has ended


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _slurm_port(environ: Mapping[str, str]) -> int:
    """Return a port that all tasks of a job step agree on, below the ephemeral range."""
    job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
    return 20000 + (int(job) + 97 * int(step)) % 12000


def _positive(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) < 1:
        raise UserError(f"{name}: expected an integer >= 1 (got {text[:40]!r})")
    return int(text)
