"""Ranks from Slurm's variables and from run_ranks: exit codes and signals of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megarl.errors import UserError
from megarl.launch import adopt_slurm, first_host, world_size


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[007-012,20],login1", "gpu007"),
        ("gpu[3,5-6]", "gpu3"),
        ("rack[0-1]n[02-13]-ib,x", "rack0n02-ib"),
        ("a-b-[11-12].cluster.org", "a-b-11.cluster.org"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


STEP = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODELIST": "gpu[01-08]",
}


def test_srun_step() -> None:
    environ = dict(STEP)
    adopt_slurm(environ)
    assert int(environ.pop("OMP_NUM_THREADS")) >= 1  # see tests/cluster/test_variables.py
    assert environ.pop("GOMP_SPINCOUNT") == "1000"
    assert environ.pop("LOCAL_WORLD_SIZE") == "1"
    assert {name: environ[name] for name in environ.keys() - STEP.keys()} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(20000 + (12345 + 97 * 2) % 12000),
    }
    assert world_size(environ) == 8


@pytest.mark.parametrize(
    ("tasks", "node", "here"),
    [
        ("8", 0, 8),
        ("8(x3),2", 0, 8),
        ("8(x3),2", 2, 8),
        ("8(x3),2", 3, 2),
        ("4,2(x2),1", 1, 2),
        ("4,2(x2),1", 3, 1),
    ],
)
def test_tasks_of_each_node(tasks: str, node: int, here: int) -> None:
    environ = STEP | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}
    adopt_slurm(environ)
    assert environ["LOCAL_WORLD_SIZE"] == str(here)


def test_all_tasks_agree_on_the_rendezvous() -> None:
    seen = set()
    for rank in range(8):
        environ = STEP | {"SLURM_PROCID": str(rank)}
        adopt_slurm(environ)
        seen.add((environ["MASTER_ADDR"], environ["MASTER_PORT"]))
    assert len(seen) == 1


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "8"},  # salloc's shell
        STEP | {"SLURM_NTASKS": "1"},
        STEP | {"WORLD_SIZE": "2"},  # torchrun inside srun
        {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"},  # sbatch script
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # srun -n1 within a larger job
    ],
)
def test_not_several_tasks_of_srun(environ: dict[str, str]) -> None:
    after = dict(environ)
    adopt_slurm(after)
    assert after == environ


def test_given_rendezvous_is_kept() -> None:
    environ = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    adopt_slurm(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_no_host_to_meet_at() -> None:
    environ = {name: value for name, value in STEP.items() if "NODELIST" not in name}
    with pytest.raises(UserError, match="neither MASTER_ADDR nor SLURM_STEP_NODELIST"):
        adopt_slurm(environ)


def test_world_size() -> None:
    assert world_size({}) is None
    assert world_size({"WORLD_SIZE": "1"}) == 1
    with pytest.raises(UserError) as caught:
        world_size({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"})
    message = "WORLD_SIZE is 2 but LOCAL_RANK, MASTER_PORT not set; start ranks with torchrun or srun"
    assert str(caught.value) == message
    with pytest.raises(UserError, match="WORLD_SIZE: expected an integer >= 1"):
        world_size({"WORLD_SIZE": "two"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("RANK", "5"),
        ("RANK", "x"),
        ("RANK", "-1"),
        ("LOCAL_RANK", "2"),
        ("MASTER_PORT", "99999"),
        ("MASTER_PORT", "x"),
        ("WORLD_SIZE", "²"),
        ("WORLD_SIZE", "9" * 5000),
    ],
)
def test_variables_that_no_launcher_sets(name: str, text: str) -> None:
    environ = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
    assert world_size(environ) == 2
    with pytest.raises(UserError, match=f"^{name}: expected an integer") as caught:
        world_size({**environ, name: text})
    assert len(str(caught.value)) < 200


def test_a_package_of_the_current_directory_is_not_started(tmp_path: Path) -> None:
    """Neither megarl nor what it imports: a yaml.py of the user's own stands for nothing of ours."""
    (tmp_path / "yaml.py").write_text("raise SystemExit(7)")
    (tmp_path / "megarl.py").write_text("raise SystemExit(7)")
    script = "import os, sys; from megarl import launch; os.chdir(sys.argv[1]); "
    script += "sys.exit(launch.run_ranks(2, ['sft', '--config', 'none.yaml']))"
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "none.yaml: cannot read the configuration" in done.stderr


# Stands in for the command line in the ranks: `python -m megarl.cli` finds this package first.
RANK_PROGRAM = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
assert os.environ["WORLD_SIZE"] == "3" and os.environ["LOCAL_RANK"] == rank
mode, folder = sys.argv[1], pathlib.Path(sys.argv[2])
if mode == "exit2":
    sys.exit(2 if rank == "1" else 0)
if mode == "killed" and rank == "1":
    while not all((folder / f"pid{other}").exists() for other in (0, 2)):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "checkpoint":
    def save(number, frame):
        time.sleep(0.5)
        with open(folder / f"saved{rank}", "a") as file:
            file.write(f"{number}\\n")
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
(folder / f"pid{rank}").write_text(f"{os.getpid()} {os.environ['MASTER_PORT']}")
if mode != "done":
    time.sleep(60)
"""


@pytest.fixture
def launcher(tmp_path: Path) -> list[str]:
    package = tmp_path / "ranks" / "megarl"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(RANK_PROGRAM)
    script = f"""
        import os, pathlib, sys
        from megarl import launch
        launch._GRACE_SECONDS = 1.0
        os.environ["PYTHONPATH"] = {str(tmp_path / "ranks")!r}  # where ranks look first
        ranks = pathlib.Path({str(tmp_path)!r}) / "ranks"
        sys.exit(launch.run_ranks(3, [sys.argv[1], {str(tmp_path)!r}], ranks))
    """
    return [sys.executable, "-c", textwrap.dedent(script)]


def wait_for_ranks(folder: Path, ranks: tuple[int, ...] = (0, 1, 2)) -> list[list[str]]:
    end = time.monotonic() + 30
    files = [folder / f"pid{rank}" for rank in ranks]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < end
        time.sleep(0.05)
    return [file.read_text().split() for file in files]


def is_running(pid: str) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("mode", "code"), [("done", 0), ("exit2", 2)])
def test_exit_code(launcher: list[str], tmp_path: Path, mode: str, code: int) -> None:
    assert subprocess.run([*launcher, mode], timeout=60).returncode == code
    if mode == "done":
        assert len({port for _, port in wait_for_ranks(tmp_path)}) == 1


def test_a_killed_rank_ends_the_others(launcher: list[str], tmp_path: Path) -> None:
    ended = subprocess.run([*launcher, "killed"], timeout=60, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 128 + signal.SIGKILL
    assert ended.stderr == "error: rank 1 was killed by SIGKILL before its run began\n"
    assert not any(is_running(pid) for pid, _ in wait_for_ranks(tmp_path, (0, 2)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_rank_once(launcher: list[str], tmp_path: Path, number: int) -> None:
    # A test run in a shell's background ignores SIGINT, and so would the launcher.
    process = subprocess.Popen(
        [*launcher, "checkpoint"], preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)
    )
    wait_for_ranks(tmp_path)
    os.kill(process.pid, number)
    assert process.wait(30) == 128 + number
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(3)] == [f"{number:d}\n"] * 3


def test_no_rank_outlives_a_killed_launcher(launcher: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen([*launcher, "sleep"])
    pids = [pid for pid, _ in wait_for_ranks(tmp_path)]
    process.kill()
    process.wait(10)
    end = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
