"""Importing changes nothing; installing happens once, before megatron.core."""

from __future__ import annotations

import os
import subprocess
import sys

_SCRIPT = """
import sys, torch
watched = [(owner, name) for owner, names in (
    (torch, ("zeros", "ones", "empty", "tensor", "arange", "zeros_like")),
    (torch.cuda, tuple(n for n in dir(torch.cuda) if callable(getattr(torch.cuda, n)))),
    (torch.Tensor, ("cuda", "to", "type", "pin_memory")),
    (torch.nn.Module, ("cuda",)),
) for name in names]
before = [getattr(*pair) for pair in watched]
import megarl, megarl.platform, megarl.platform.cpu
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
