"""Machines that are too small, and temporary directories that are none, are said before anything starts."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.cluster.limits import check_shared_memory, choose_temp_dir
from megarl.errors import UserError

SHARE = """
import os, sys
from megarl.cluster.limits import choose_temp_dir
if sys.argv[1] == "mend":
    choose_temp_dir()
import torch
torch.zeros(4).untyped_storage()._share_filename_cpu_()
"""


@pytest.mark.parametrize("kind", ["missing", "long"])
def test_torch_shares_memory_whatever_tmpdir_is(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / ("x" * 100 if kind == "long" else "none")
    if kind == "long":
        folder.mkdir()
    environ = {**os.environ, "TMPDIR": str(folder)}

    def share(how: str) -> int:
        command = [sys.executable, "-c", SHARE, how]
        return subprocess.run(command, env=environ, capture_output=True, timeout=120).returncode

    assert share("leave") != 0, "torch has learnt it: the code may go"
    assert share("mend") == 0


def test_a_good_temporary_directory_stays(tmp_path_factory: pytest.TempPathFactory) -> None:
    environ = {"TMPDIR": "/tmp"}
    assert choose_temp_dir(environ) is None
    assert choose_temp_dir({}) is None
    environ = {"TMPDIR": "/" + "y" * 72}
    note = choose_temp_dir(environ)
    assert note is not None
    assert note.startswith("TMPDIR: /yyy")
    assert environ == {"TMPDIR": "/tmp"}


def test_shared_memory_too_small_for_the_weights(tmp_path: Path) -> None:
    check_shared_memory(1000)
    with pytest.raises(UserError, match=r"MiB free.*share the weights there: .*--shm-size"):
        check_shared_memory(2**60)
    with pytest.raises(UserError, match="0.0 MiB free"):
        check_shared_memory(0, tmp_path / "none")


@pytest.mark.parametrize(
    ("limit", "value", "says"),
    [
        (resource.RLIMIT_NOFILE, 64, "ulimit -n: 64 open files"),
        (resource.RLIMIT_AS, 2**31, "ulimit -v: 2048 MiB"),
    ],
)
def test_limits_with_which_nothing_starts(limit: int, value: int, says: str) -> None:
    code = f"import resource; resource.setrlimit({limit}, ({value}, {value}))\n"
    code += "from megarl.cluster.limits import check_limits\n"
    code += "from megarl.errors import UserError\n"
    code += "try:\n    check_limits()\nexcept UserError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(says), done.stderr
