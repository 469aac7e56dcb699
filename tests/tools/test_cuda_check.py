"""tools/cuda_check.py: parsing of nvcc's report, and its failures."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void megarl::op::first<float, (bool)1>(float*)' for 'sm_90'
ptxas info    : Function properties for void megarl::op::first<float, (bool)1>(float*)
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 192 bytes smem
ptxas info    : Compile time = 12.3 ms
ptxas info    : Compiling entry function 'megarl::op::second(int)' for 'sm_100'
ptxas info    : Function properties for megarl::op::second(int)
    40 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 40 bytes cumulative stack size
"""


@pytest.fixture(scope="module")
def cuda_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_check", ROOT / "tools" / "cuda_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_report_is_read(cuda_check: ModuleType) -> None:
    first, second = cuda_check.parse_report(REPORT)
    assert first == cuda_check.Kernel("op::first<float, true>", "sm_90", 0, 0, 64, 192)
    assert second == cuda_check.Kernel("op::second", "sm_100", 40, 24, 255, 0)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks"),
    [
        (64, 192, 256, 4),  # 64 registers x 256 threads: a quarter of 65,536
        (65, 0, 256, 3),  # allocated in steps of 8
        (32, 0, 256, 8),  # 64 warps
        (16, 0, 32, 32),  # 32 blocks
        (32, 100 * 1024, 256, 2),  # 228 KiB of shared memory
    ],
)
def test_occupancy(cuda_check: ModuleType, registers: int, shared: int, threads: int, blocks: int) -> None:
    assert cuda_check.Kernel("k", "sm_90", 0, 0, registers, shared).resident_blocks(threads) == blocks


def test_spills_and_local_memory_are_refused(
    cuda_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_check, "block_size", lambda header: 256)
    kernels = list(cuda_check.parse_report(REPORT))
    stack_only = cuda_check.Kernel("op::third", "sm_80", 8, 0, 32, 0)
    assert cuda_check.print_table("op/op", [*kernels, stack_only]) == [
        "op::second (sm_100) spills 24 bytes of registers",
        "op::third (sm_80) keeps 8 bytes in local memory",
    ]
    assert "op::first" in capsys.readouterr().out


def test_every_kernel_of_the_tree_is_checked(cuda_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_check.check_variants() == []
    fewer = dict(cuda_check.VARIANTS)
    fewer["packing/pack_sequences"] = ["pack_sequences::pack"]
    del fewer["token_logprob/token_logprob"]
    monkeypatch.setattr(cuda_check, "VARIANTS", fewer)
    assert cuda_check.check_variants() == [
        "token_logprob/token_logprob_kernels.cuh is not in VARIANTS of tools/cuda_check.py",
        "packing/pack_sequences: kernel unpack is not in VARIANTS",
    ]


def test_missing_nvcc(
    cuda_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["cuda_check.py"])
    assert cuda_check.main() == 1
    assert "nvcc is not on PATH" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["cuda_check.py", "--allow-missing"])
    assert cuda_check.main() == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_spilling_kernel_fails(
    cuda_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    header = tmp_path / "bad" / "bad_kernels.cuh"
    header.parent.mkdir()
    header.write_text(
        "#include <cstdint>\nnamespace megarl::bad { constexpr int kThreads = 32;\n"
        "__global__ void indexed(const int* x, int* y) {\n"
        "  int a[64];\n  for (int i = 0; i < 64; ++i) a[x[i] % 64] = i;\n  y[0] = a[x[64] % 64];\n} }\n"
    )
    monkeypatch.setattr(cuda_check, "CSRC", tmp_path)
    monkeypatch.setattr(cuda_check, "FLAGS", ["-std=c++20", "-O3", f"-I{tmp_path}"])
    monkeypatch.setattr(cuda_check, "VARIANTS", {"bad/bad": ["bad::indexed"]})
    problems = cuda_check.check_headers("nvcc", ["bad/bad"], ["sm_90"], tmp_path)
    assert problems == ["bad::indexed (sm_90) keeps 256 bytes in local memory"]
