"""Run programs on the fake GPUs, in the CUDA environment; its tests are skipped without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fake_cuda.activate import Session, cuda_python, environment, session

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def megarl_extension() -> Path | None:
    """megarl._C for that python: the tree's, or a copy of what `make cuda-env-check` has built."""
    if not cuda_python().exists():
        return None
    command = [str(cuda_python()), "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"]
    name = "_C" + subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    in_tree = ROOT / "megarl" / name
    built = [*(ROOT / ".setup").glob(f"*/megarl/{name}")]
    if built and not (in_tree.exists() and in_tree.stat().st_mtime >= built[0].stat().st_mtime):
        shutil.copy2(built[0], in_tree)
    return in_tree if in_tree.exists() else None


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark this folder's tests, and skip them where the CUDA environment is missing."""
    here = [item for item in items if HERE in item.path.parents]
    reason = f"no CUDA environment: {cuda_python()} is missing (MEGARL_CUDA_ENV names its python)"
    for item in here:
        item.add_marker(pytest.mark.fake_cuda)
        if not cuda_python().exists():
            item.add_marker(pytest.mark.skip(reason=reason))


@dataclass
class Finished:
    """One process that has ended."""

    code: int
    output: str
    errors: str

    @property
    def result(self) -> Any:
        """The last printed line, as JSON."""
        return json.loads(self.output.strip().splitlines()[-1])


def describe(ended: list[Finished]) -> str:
    """Describe how processes ended and their last output, for failure messages."""
    return "\n".join(f"exit code {p.code}:\n{p.output[-2000:]}{p.errors[-4000:]}" for p in ended)


@dataclass
class FakeGpu:
    """Starts processes of one session on the fake GPUs."""

    session: Session
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(
        self, program: str, *arguments: str, lazy: bool = False, **settings: Any
    ) -> subprocess.Popen[str]:
        """Start one process; ``settings`` go to :func:`tests.fake_cuda.activate.environment`."""
        options = {name: settings.pop(name) for name in ("devices", "memory_gb") if name in settings}
        variables = {name: str(value) for name, value in settings.items()}
        if lazy:
            variables["FAKECUDA_STREAM_ORDER"] = "lazy"
        python = str(cuda_python())
        active = environment(python, self.session.path, **options, **variables)
        active["PYTHONPATH"] = os.pathsep.join([active["PYTHONPATH"], str(ROOT)])
        command = [python, str(HERE / program), *arguments]
        number = len(self.started)
        with (
            self._file(number, "output").open("w") as output,
            self._file(number, "errors").open("w") as errors,
        ):
            process = subprocess.Popen(
                command, stdout=output, stderr=errors, text=True, env={**os.environ, **active}, cwd=ROOT
            )
        self.started.append(process)
        return process

    def _file(self, number: int, kind: str) -> Path:
        return self.session.path / f"process-{number}.{kind}"

    def finish(self, processes: list[subprocess.Popen[str]], timeout: float = 270) -> list[Finished]:
        """Wait for all of them. If one fails, the others get 5 more seconds: they may wait for it."""
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                end = min(end, time.monotonic() + 5)
            time.sleep(0.02)
        ended = []
        for process in processes:
            if process.poll() is None:
                process.kill()
            code = process.wait()
            number = self.started.index(process)
            texts = [self._file(number, kind).read_text() for kind in ("output", "errors")]
            ended.append(Finished(code, *texts))
        return ended

    def run(
        self, program: str, *arguments: str, ranks: int = 1, skips: bool = False, **settings: Any
    ) -> list[Any]:
        """Return the last output of ``ranks`` processes. None may fail or, unless ``skips``, skip work."""
        store = (
            self.session.path / f"store-{program.replace('/', '_')}-{len(list(self.session.path.iterdir()))}"
        )
        processes = [
            self.start(
                program,
                *arguments,
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE=ranks,
                STORE=store,
                **settings,
            )
            for rank in range(ranks)
        ]
        ended = self.finish(processes)
        assert all(process.code == 0 for process in ended), describe(ended)
        assert skips or not self.session.skipped(), self.session.skipped()
        return [process.result for process in ended]


@pytest.fixture
def fake_gpu() -> Any:
    """A session per test; its shared memory is removed afterwards."""
    with session() as opened:
        gpu = FakeGpu(opened)
        yield gpu
        for process in gpu.started:
            if process.poll() is None:
                process.kill()
                process.wait()
