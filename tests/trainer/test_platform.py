"""Importing changes nothing; installing happens once, before megatron.core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import sys, torch
watched = [(owner, name) for owner, names in (
    (torch, ("zeros", "ones", "empty", "tensor", "arange", "zeros_like")),
    (torch.cuda, tuple(n for n in dir(torch.cuda) if callable(getattr(torch.cuda, n)))),
    (torch.Tensor, ("cuda", "to", "type", "pin_memory")),
    (torch.nn.Module, ("cuda",)),
) for name in names]
before = [getattr(*pair) for pair in watched]
import megarl, megarl.platform, megarl.platform.cpu, megarl.platform.cuda, megarl.platform.megatron
assert all(getattr(*pair) is old for pair, old in zip(watched, before)), "an import patched torch"
assert "megatron" not in sys.modules
try:
    megarl.platform.current()
except AssertionError:
    pass
else:
    raise SystemExit("current() before install()")
first = megarl.platform.install()
assert megarl.platform.install() is first is megarl.platform.current()
assert (first.name, first.backend) == ("cpu", "gloo")
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.zeros_like(torch.ones(2), device=torch.device("cuda", 0)).device.type == "cpu"
assert torch.ones(2).type() == "torch.FloatTensor"
generator = torch.cuda.get_rng_state()
draws = torch.rand(3)
torch.cuda.set_rng_state(generator)
assert torch.equal(torch.rand(3), draws)
print("ok")
"""
_LATE = """
import megatron.core, megarl.platform
megarl.platform.install()
"""

_GPU = """
import json, traceback, torch, megarl.platform
from types import SimpleNamespace

cards = []
torch.cuda.set_device = cards.append
megarl.platform.chosen_name = lambda: "cuda"
assert megarl.platform.install().backend == "nccl"

def chosen():
    assert cards == [torch.device("cuda", 0)]
    assert torch.cuda.current_stream.__module__ == "torch.cuda", "a GPU needs nothing of cpu.py"
    assert torch.zeros.__name__ == "zeros" and not hasattr(torch.Tensor.to, "__wrapped__")

def routes():
    from megatron.core.transformer.moe.moe_utils import router_gating_linear
    x, weight = (torch.randn(n, 4, requires_grad=True) for n in (3, 5))
    router_gating_linear(x, weight, None, torch.float32).square().sum().backward()
    expected = [t.detach().clone().requires_grad_() for t in (x, weight)]
    (expected[0] @ expected[1].T).square().sum().backward()
    for one, two in zip((x, weight), expected):
        assert torch.allclose(one.grad, two.grad, atol=1e-5)

def resumes():
    from megatron.core.optimizer import Adam
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    params = [torch.zeros(2), torch.zeros(2)]
    inner, together = Adam(params, lr=0.1), torch.tensor(7.0)  # steps, as a checkpoint has them for all
    for param in params:
        inner.state[param] = {"step": together, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False)
    index = {param: (0, number) for number, param in enumerate(params)}
    optimizer = SimpleNamespace(optimizer=inner, config=config, model_param_group_index_map=index)
    for param in params:
        saved = {name: torch.ones(2) for name in ("param", "exp_avg", "exp_avg_sq")}
        DistributedOptimizer._set_main_param_and_optimizer_states(optimizer, param, saved)
        param.grad = torch.ones(2)
    inner.step()
    assert [float(inner.state[param]["step"]) for param in params] == [8, 8]

def plans():
    assert not torch.backends.cuda.cudnn_sdp_enabled()

errors = {}
for check in (chosen, routes, resumes, plans):
    try:
        check()
    except Exception:
        errors[check.__name__] = traceback.format_exc()
print(json.dumps(errors))
"""


def _run(script: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MEGARL_PLATFORM": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )


def test_imports_patch_nothing_and_installing_twice_is_one() -> None:
    result = _run(_SCRIPT)
    assert result.stdout.strip() == "ok", result.stderr


def test_installing_after_megatron_is_refused() -> None:
    result = _run(_LATE)
    assert "must come before importing megatron.core" in result.stderr


@pytest.fixture(scope="module")
def errors_on_a_gpu() -> dict[str, str]:
    """Errors by check in a process on the GPU platform without Transformer Engine."""
    result = _run(_GPU)
    assert result.returncode == 0, result.stderr
    errors: dict[str, str] = json.loads(result.stdout)
    return errors


@pytest.mark.parametrize("check", ["chosen", "routes", "resumes", "plans"])
def test_a_gpu_without_transformer_engine(errors_on_a_gpu: dict[str, str], check: str) -> None:
    """It routes tokens to experts, resumes with the distributed optimizer, and makes no plans per shape."""
    assert check not in errors_on_a_gpu, errors_on_a_gpu[check]


def test_a_cpu_takes_no_kernels_made_for_gpus(tmp_path: Path) -> None:
    """Packages that need a GPU may be installed where a run is configured for the CPU."""
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "pytorch" / "__init__.py").write_text("")
    (package / "pytorch" / "optimizers.py").write_text("class FusedAdam: pass")
    script = """
import megarl.platform
megarl.platform.install()
from megatron.core.optimizer import Adam
print(Adam.__module__)
"""
    result = _run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + script)
    assert result.stdout.startswith("torch.optim"), result.stderr
