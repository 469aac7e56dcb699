"""The guide's table of what holds in which isolation is what happens here, as root and as nobody."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.environments.try_ways_out import PLAIN_PYTHON, ROOT

GUIDE = ROOT / "docs/guides/code.md"
HEADER = "| what does not get through |"


def _run(folder: Path, **user: Any) -> dict[tuple[str, str], str]:
    folder.mkdir()
    os.chown(folder, user.get("user", 0), user.get("group", 0))
    code = [PLAIN_PYTHON, "-B", str(Path(__file__).with_name("try_ways_out.py")), str(folder)]
    try:
        done = subprocess.run(
            code,
            cwd="/",
            env={**os.environ, "TMPDIR": "/tmp"},
            capture_output=True,
            text=True,
            check=False,
            **user,
        )
    finally:
        subprocess.run(["/bin/rm", "-rf", str(folder)], check=True)
    assert done.returncode == 0, done.stderr
    return {(isolation, way): how for isolation, way, how in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be both")
@pytest.mark.skipif(not os.path.exists(PLAIN_PYTHON), reason="no Python outside root's home")
def test_the_guide_says_what_holds() -> None:
    seen = _run(Path(f"/tmp/megarl-ways-root-{os.getpid()}"))
    nobody = _run(Path(f"/tmp/megarl-ways-nobody-{os.getpid()}"), user=65534, group=65534, extra_groups=[])
    assert {key for key in seen if not key[1]} == {key for key in nobody if not key[1]}
    both = (seen, nobody)
    columns = {"namespaces": both, "bubblewrap": both, "landlock": (seen,), "landlock, not root": (nobody,)}
    told = _read_table()
    for (way, column), said in told.items():
        runs = columns[column]
        for run in runs:
            if (how := run.get((column.split(",")[0], way))) is not None:
                enough = ("yes", "ended") if said == "ended" else (said,)  # in time to hold it, or at once
                assert how in enough, (way, column, run is nobody)
    assert {way for way, _ in told} == {way for _, way in seen if way}


def _read_table() -> dict[tuple[str, str], str]:
    lines = iter(GUIDE.read_text().splitlines())
    header = next(line for line in lines if line.startswith(HEADER))
    names = [cell.strip() for cell in header.strip("|").split("|")][1:]
    next(lines)
    found = {}
    for line in lines:
        if not line.startswith("|"):
            break
        way, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found |= {(way, name): cell for name, cell in zip(names, cells, strict=True)}
    return found
