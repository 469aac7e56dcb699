"""GPUs that a run cannot use are rejected in one line before anything starts; with a fake NVML."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl import doctor
from megarl.cluster import devices, ray_ranks
from megarl.cluster.devices import Driver, check_devices
from megarl.errors import UserError
from tests.end_to_end.harness import SFT, write_config
from tests.processes import apart_from_waits

OLD, NEW = Driver("550.54.14", (12, 4), 2), Driver("580.65.06", (13, 0), 2)

NVML = """
#include <string.h>
int nvmlInit_v2(void) { return LOADED ? 0 : 9; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "550.54.14", size); return 0; }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = 12040; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
"""
# A torch built for CUDA 13, as far as megarl can tell.
COMMAND = """
import sys, torch
torch.version.cuda = "13.0"
from megarl.cli import main
code = main(sys.argv[1:])
started = [name for name in ("ray", "vllm", "megatron.core") if name in sys.modules]
sys.exit(code if not started else f"started {started}")
"""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with the driver and the number of GPUs that torch sees."""

    def there(driver: Driver | None, seen: int, built_for: str | None = "13.0") -> None:
        monkeypatch.setattr(devices, "find_driver", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", built_for)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        monkeypatch.setattr(
            torch.cuda, "init", lambda: raise_("CUDA error 802: system not yet initialized\nmore")
        )

    return there


def raise_(text: str) -> None:
    raise RuntimeError(text)


def test_no_gpu_no_complaint(gpus: Any) -> None:
    gpus(None, 0)
    check_devices(8, {})
    gpus(Driver("580.65.06", (13, 0), 0), 0)
    check_devices(8, {})
    gpus(OLD, 0, built_for=None)  # torch's CPU build
    check_devices(8, {})


@pytest.mark.parametrize(
    "choice", [{"MEGARL_PLATFORM": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}]
)
def test_the_cpu_is_a_choice(gpus: Any, choice: dict[str, str]) -> None:
    gpus(OLD, 0)
    check_devices(8, choice)


@pytest.mark.parametrize(
    ("driver", "seen", "num_ranks", "environ", "message"),
    [
        (
            OLD,
            0,
            1,
            {},
            "CUDA: driver 550.54.14, for CUDA up to 12.4, is too old: torch was built for CUDA 13.0 and "
            "needs a driver for it, 580 or newer; MEGARL_PLATFORM=cpu trains without a GPU",
        ),
        (
            NEW,
            0,
            1,
            {},
            "CUDA: torch sees none of 2 GPUs (driver 580.65.06, for CUDA up to 13.0): CUDA error 802: system "
            "not yet initialized; MEGARL_PLATFORM=cpu trains without a GPU",
        ),
        (
            NEW,
            1,
            2,
            {"CUDA_VISIBLE_DEVICES": "1"},
            "parallel.num_processes: 2 ranks need 2 visible GPUs, this machine has 1 "
            "(CUDA_VISIBLE_DEVICES=1); NCCL takes one rank per GPU; MEGARL_PLATFORM=cpu trains without a GPU",
        ),
        (
            NEW,
            2,
            3,
            {"LOCAL_WORLD_SIZE": "3"},
            "LOCAL_WORLD_SIZE: 3 ranks need 3 visible GPUs, this machine has 2; NCCL takes one "
            "rank per GPU; MEGARL_PLATFORM=cpu trains without a GPU",
        ),
        (
            NEW,
            2,
            2,
            {"CUDA_VISIBLE_DEVICES": "0, 1,0"},
            "CUDA_VISIBLE_DEVICES: lists 0 2 times (got 0, 1,0); ranks cannot share a GPU",
        ),
        (
            NEW,
            2,
            2,
            {},
            "megarl._C: built without CUDA kernels, and there is a GPU: FORCE_CUDA=1 make setup builds them",
        ),
    ],
)
def test_what_would_stop_ranks_is_said_in_a_line(
    gpus: Any,
    driver: Driver,
    seen: int,
    num_ranks: int,
    environ: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus(driver, seen)
    monkeypatch.setattr(devices, "has_cuda_kernels", lambda: False)
    with pytest.raises(UserError) as refused:
        check_devices(num_ranks, environ)
    assert str(refused.value) == message


def test_a_gpu_for_each_rank_is_enough(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(NEW, 2)
    monkeypatch.setattr(devices, "has_cuda_kernels", lambda: True)
    check_devices(2, {"CUDA_VISIBLE_DEVICES": "0,1"})


def build_nvml(folder: Path, *, loaded: bool) -> dict[str, str]:
    """An environment whose NVML reports an old driver."""
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("g++")
    assert compiler is not None
    (folder / "nvml.c").write_text(NVML)
    library = str(folder / "libnvidia-ml.so.1")
    options = ["-shared", "-fPIC", f"-DLOADED={int(loaded)}", "-x", "c"]
    subprocess.run([compiler, *options, str(folder / "nvml.c"), "-o", library], check=True)
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return kept | {"LD_LIBRARY_PATH": str(folder)}


@pytest.mark.parametrize(("loaded", "found"), [(True, OLD), (False, None)])
def test_the_driver_is_asked_through_nvml(tmp_path: Path, loaded: bool, found: Driver | None) -> None:
    environment = build_nvml(tmp_path, loaded=loaded)
    program = "from megarl.cluster.devices import find_driver; print(repr(find_driver()))"
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert said.stdout.strip() == repr(found), said.stderr


def test_a_command_ends_with_the_line_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("tokenizer.json", "model.safetensors"):  # checked, but read only by runs that start
        (tmp_path / "model" / name).touch()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 64, "head_dim": 32, "max_position_embeddings": 512}
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "tie_word_embeddings": True,
        **sizes,
    }
    config |= {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu", "attention_bias": False}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    file = write_config(tmp_path / "sft.yaml", SFT, run_dir=tmp_path / "run", model=tmp_path / "model")
    command = [sys.executable, "-c", COMMAND, "sft", "--config", str(file), "parallel.num_processes=2"]
    environment = build_nvml(tmp_path, loaded=True)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    [line] = apart_from_waits(ended.stderr)
    assert line.startswith("error: CUDA: driver 550.54.14, for CUDA up to 12.4, is too old")
    assert not (tmp_path / "run").exists()


def test_a_ray_of_this_machine_alone_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks on a cluster wait for nodes; here none joins."""
    import ray

    monkeypatch.setattr(ray_ranks, "connect_ray", lambda _: "address")
    monkeypatch.setattr(ray_ranks, "started_here", lambda: True)
    monkeypatch.setattr(ray_ranks, "_wants_gpus", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 2.0})
    monkeypatch.setattr(ray_ranks, "_place", lambda *_: pytest.fail("placed"))
    with pytest.raises(UserError, match="parallel.num_processes: 4 ranks, but this machine's Ray has 2 GPUs"):
        ray_ranks.start_ranks(4, [])


@pytest.mark.parametrize(
    ("driver", "built_for", "available", "level", "says"),
    [
        (None, "13.0", False, "ok", ""),
        (OLD, "13.0", False, "problem", "580 or newer"),
        (NEW, "13.0", False, "problem", "torch sees none of them (CUDA_VISIBLE_DEVICES=7)"),
        (NEW, "13.0", True, "ok", ""),
        (OLD, "12.8", True, "ok", ""),  # CUDA's minor versions run on the major's first driver
        (NEW, None, False, "note", "MEGARL_CUDA=1 make setup"),
    ],
)
def test_doctor_tells_what_the_driver_runs(
    monkeypatch: pytest.MonkeyPatch,
    driver: Driver | None,
    built_for: str | None,
    available: bool,
    level: str,
    says: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    finding = doctor.driver_finding(driver, built_for, available=available)
    assert finding.level == level and says in finding.meaning
    assert driver is None or (driver.version in finding.found and "2 GPUs" in finding.found)


def test_transformer_engine_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    finding = doctor.transformer_engine_finding()
    assert (finding.found, finding.level) == ("none", "ok")


def test_transformer_engine_finds_the_nccl_that_torch_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its library links to libnccl, which is in a wheel that only torch searches."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    needs = "import sys\nif 'torch' not in sys.modules:\n    raise OSError('libnccl.so.2: cannot open it')\n"
    (package / "__init__.py").write_text(needs)
    (package / "pytorch.py").write_text("")
    info = tmp_path / "transformer_engine-2.20.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: transformer-engine\nVersion: 2.20.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    finding = doctor.transformer_engine_finding()
    assert (finding.found, finding.level) == ("2.20.2", "ok")
