"""The Ray of one machine: who reaches it, whose its folder is, and whose folder is removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megarl.cluster import ray_runtime

RUN = """
import json, os, stat, sys
import psutil
from megarl.cluster import ray_runtime

def main():
    ray_runtime.start_ray(1)
    import ray

    @ray.remote
    class Actor:
        def look(self):
            import yaml
            return yaml.__file__

    yaml = ray.get(Actor.remote().look.remote())
    me = psutil.Process()
    found = [c for p in [me, *me.children(recursive=True)] for c in p.net_connections("inet")]
    folder = ray_runtime.ray_temp_dir()
    print(json.dumps({
        "listens": sorted({c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}),
        "mode": stat.S_IMODE(folder.stat().st_mode),
        "yaml": yaml,
    }))
    ray_runtime.stop_ray()

if __name__ == "__main__":
    main()
"""


def test_nobody_else_reaches_it(tmp_path: Path) -> None:
    """No port beyond this machine, no folder of another user, and no module of the current directory."""
    (tmp_path / "yaml.py").write_text("raise SystemExit('the yaml.py of the current directory')")
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "run.py").write_text(RUN)
    command = [sys.executable, str(folder / "run.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]

    found = json.loads(done.stdout.splitlines()[-1])
    assert {ip.removeprefix("::ffff:") for ip in found["listens"]} == {"127.0.0.1"}
    assert found["mode"] == 0o700
    assert "site-packages" in found["yaml"]


@pytest.fixture
def temp_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ray_runtime, "_temp_root", lambda: tmp_path)
    return tmp_path


def test_a_lock_says_whether_a_folder_is_in_use(temp_root: Path) -> None:
    """Not a process id: another container's is not in this one's /proc, and its run is alive all the same."""
    code = f"""
        import sys
        from pathlib import Path
        from megarl.cluster import ray_runtime
        ray_runtime._temp_root = lambda: Path({str(temp_root)!r})
        folder, lock = ray_runtime.make_temp_dir()
        print(folder, flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None
    assert other.stdout is not None
    theirs = Path(other.stdout.readline().strip())
    (temp_root / "megarl-ray-999999999-live").mkdir()  # being made, or of an older version
    mine, lock = ray_runtime.make_temp_dir()
    assert theirs.is_dir()
    assert (temp_root / "megarl-ray-999999999-live").is_dir()
    other.kill()
    other.communicate()
    os.utime(temp_root / "megarl-ray-999999999-live", (0, time.time() - 3600))
    ray_runtime._remove_stale_dirs()
    assert not theirs.exists()
    assert not (temp_root / "megarl-ray-999999999-live").exists()
    assert mine.is_dir()
    lock.close()


def test_sockets_fit_into_the_longest_folder(temp_root: Path) -> None:
    """Linux takes 107 bytes for the name of a socket; Ray's are the longest."""
    folder, lock = ray_runtime.make_temp_dir()
    lock.close()
    longest = "session_2026-11-28_19-41-36_123456_1234567/sockets/plasma_store"
    name = len(folder.name) + len(f"/{ray_runtime._INNER}/{longest}")
    assert ray_runtime._MAX_TEMP_ROOT + 1 + name <= 107
