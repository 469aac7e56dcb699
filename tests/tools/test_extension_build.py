"""setup.py: the toolkit that compiles the CUDA kernels, and the libraries it links."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py in tmp_path, with NVIDIA's wheels there."""
    spec = importlib.util.spec_from_file_location("megarl_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "WHEEL_TOOLKIT", tmp_path / "site-packages" / "nvidia" / "cu13")
    monkeypatch.setenv("PATH", str(tmp_path / "usr" / "bin"))
    for name in ("CUDA_HOME", "FORCE_CUDA"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever setup.py sets
        monkeypatch.delenv(name)
    return module


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    return path


def test_the_machines_toolkit_comes_before_the_wheels(build: ModuleType, tmp_path: Path) -> None:
    assert build.find_toolkit() == ""
    wheel = program(build.WHEEL_TOOLKIT / "bin" / "nvcc")
    assert build.find_toolkit() == str(wheel)
    assert os.environ.pop("CUDA_HOME") == str(build.WHEEL_TOOLKIT)
    found = program(tmp_path / "usr" / "bin" / "nvcc")
    assert build.find_toolkit() == str(found)
    assert "CUDA_HOME" not in os.environ  # torch finds that one itself
    os.environ["CUDA_HOME"] = str(tmp_path / "cuda")
    assert build.find_toolkit() == str(tmp_path / "cuda" / "bin" / "nvcc")


def test_when_the_cuda_kernels_are_built(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert build.decide_cuda("13.0", "/bin/nvcc") == (True, "torch for CUDA 13.0, /bin/nvcc")
    assert build.decide_cuda("13.0", "") == (False, "nvcc not found")
    assert build.decide_cuda(None, "/bin/nvcc") == (False, "torch is a CPU build")
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert build.decide_cuda(None, str(program(tmp_path / "nvcc"))) == (True, "FORCE_CUDA=1")
    for nvcc, said in (("", "neither on PATH nor in CUDA_HOME"), ("/none/bin/nvcc", "no /none/bin/nvcc")):
        with pytest.raises(SystemExit) as ended:
            build.decide_cuda("13.0", nvcc)
        assert ended.value.code == (
            f"error: FORCE_CUDA=1 needs nvcc ({said}): install CUDA's toolkit, or set CUDA_HOME"
        )


def test_the_linker_finds_the_runtime_of_the_wheels(build: ModuleType) -> None:
    library = build.WHEEL_TOOLKIT / "lib" / "libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.write_text("the runtime")
    for _ in range(2):  # a second build finds the link of the first
        assert Path(build.cudart_directory(), "libcudart.so").read_text() == "the runtime"
