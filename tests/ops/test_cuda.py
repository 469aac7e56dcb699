"""Every native op on CUDA against its CPU version, which has separate tests. Needs a CUDA build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megarl.ops import PolicyLossOptions, policy_loss, token_logprob, vocab_kl

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# Relative to each tensor's largest value: exp in one MUFU instruction is good to 2^-22.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-10}


def on(device: str, value: Any) -> Any:
    """Tensors of a nested structure on ``device``; leaves stay leaves."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: on(device, item) for name, item in value.items()}
    return value


def compare(function: Callable[..., Any], arguments: dict[str, Any], tolerance: float) -> None:
    """Outputs, and the gradients of sum(output * fixed noise) by every argument that wants one."""
    results = []
    for device in ("cpu", DEVICE):
        inputs = on(device, arguments)
        outputs = function(**inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else [t for t in outputs if t is not None]
        leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        scored = [t for t in outputs if t.requires_grad]
        if leaves:
            generator = torch.Generator().manual_seed(0)
            noise = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in scored]
            loss = sum((t.double() * n.to(device)).sum() for t, n in zip(scored, noise, strict=True))
            outputs += torch.autograd.grad(loss, leaves)
        results.append([t.detach().cpu() for t in outputs])
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        scale = expected.double().abs().nan_to_num(posinf=0).max().item() if expected.numel() else 1.0
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(scale, 1e-6))


def logits_of(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, columns, generator=generator)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "columns"), [(0, 100), (1, 262_144), (5, 1003), (700, 32_000)])
@pytest.mark.parametrize("selected", [False, True])
def test_token_logprob(rows: int, columns: int, dtype: torch.dtype, selected: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    arguments: dict[str, Any] = {"logits": logits_of(rows, columns, dtype, 1), "inplace_backward": False}
    index = torch.randperm(rows, generator=generator)[: max(rows // 2, 0)] if selected else torch.arange(rows)
    if selected:
        arguments["row_index"] = index
        arguments["min_logit"] = torch.full(
            (len(index),), -1.0, dtype=torch.promote_types(dtype, torch.float32)
        )
    arguments["targets"] = torch.randint(columns, (len(index),), generator=generator)
    arguments["temperature"] = torch.rand(len(index), generator=generator) + 0.5
    compare(token_logprob, arguments, TOLERANCE[dtype])


def test_token_logprob_overwrites_the_logits() -> None:
    logits = logits_of(3, 1000, torch.float32, 2).detach().to(DEVICE)
    leaf = logits.clone().requires_grad_()
    copy = leaf * 1
    result = token_logprob(copy, torch.tensor([1, 2, 3], device=DEVICE))
    result.logprob.sum().backward()
    expected = torch.nn.functional.one_hot(torch.tensor([1, 2, 3]), 1000).to(DEVICE) - logits.softmax(-1)
    torch.testing.assert_close(copy.detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("direction", ["forward", "reverse", "jensen_shannon"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 262_144), (5, 1003), (300, 32_000)])
def test_vocab_kl(rows: int, columns: int, direction: str, dtype: torch.dtype) -> None:
    arguments = {
        "student": logits_of(rows, columns, dtype, 3),
        "teacher": logits_of(rows, columns, dtype, 4).detach(),
        "direction": direction,
        "inplace_backward": False,
    }
    compare(vocab_kl, arguments, TOLERANCE[dtype])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        *({"correction": name} for name in ("tis", "icepop", "sequence_mask", "sequence_tis")),
        {"correction": "sequence_mask_tis", "correction_token_high": 1.5},
        {"correction": "sequence_icepop", "sequence_weight": "product"},
        {"objective": "sapo", "negative": (1.05, 0.0)},
        {"log_ratio_clamp": 0.5, "kl_input_clamp": 0.4, "kl_output_clamp": 0.05},
        {"kl_gradient": "unbiased_rollout"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_policy_loss(level: str, changed: dict[str, Any], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([7, 1, 40, 0, 5000, 5])
    total = int(lengths.sum())
    names = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages", "entropy")
    arguments: dict[str, Any] = {n: torch.randn(total, generator=generator, dtype=dtype) / 2 for n in names}
    arguments["logprobs"].requires_grad_()
    arguments["entropy"].requires_grad_()
    arguments["weights"] = (torch.rand(total, generator=generator) > 0.3).to(dtype) / total
    arguments["sequence_ids"] = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    band = {"correction_low": 0.5, "correction_high": 2.0}
    terms = {"kl": "k3", "kl_coef": 0.1, "entropy_coef": 0.01}
    options = PolicyLossOptions(level=level, **band, **(terms | changed))  # type: ignore[arg-type]
    compare(
        lambda **kw: policy_loss(**kw, options=options, num_sequences=len(lengths)),
        arguments,
        TOLERANCE[dtype],
    )


def test_policy_sums_are_equal_bit_by_bit_from_run_to_run() -> None:
    generator = torch.Generator().manual_seed(6)
    cur, old, advantages, weights = (torch.rand(50_000, generator=generator).to(DEVICE) for _ in range(4))
    runs = [policy_loss(cur, old, advantages, weights, options=PolicyLossOptions()).sums for _ in range(5)]
    assert all(torch.equal(runs[0], other) for other in runs[1:])


def test_segments() -> None:
    generator = torch.Generator().manual_seed(7)
    cu = torch.tensor([0, 0, 1, 1030, 1030, 9000, 9031], dtype=torch.int32)
    values = torch.randn(9031, generator=generator)
    mask = (torch.rand(9031, generator=generator) > 0.4).float()
    ops = torch.ops.megarl
    for mean in (False, True):
        compare(ops.segment_reduce, {"values": values, "cu_seqlens": cu, "mask": mask, "mean": mean}, 1e-6)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_pack_and_unpack(cp_size: int) -> None:
    generator = torch.Generator().manual_seed(8)
    lengths = torch.tensor([5, 0, 900, 1, 17], dtype=torch.int32)
    padded = (lengths.clamp(min=1) + 2 * cp_size - 1) // (2 * cp_size) * (2 * cp_size)
    cu = torch.cat([torch.zeros(1), padded.cumsum(0)]).int()
    total = int(lengths.sum())
    arguments = {
        "token_ids": torch.randint(50_000, (total,), generator=generator),
        "loss_mask": torch.randint(2, (total,), generator=generator).to(torch.uint8),
        "rollout_logprobs": torch.randn(total, generator=generator),
        "starts": lengths.cumsum(0) - lengths,
        "lengths": lengths,
        "rows": torch.arange(len(lengths)),
        "advantages": torch.randn(len(lengths), generator=generator),
        "cu_seqlens": cu,
        "num_tokens": int(cu[-1]) // cp_size,
        "cp_size": cp_size,
    }
    for cp_rank in range(cp_size):
        compare(torch.ops.megarl.pack_sequences, {**arguments, "cp_rank": cp_rank}, 0.0)
    fields = ("lengths", "starts")
    values = torch.randn(int(cu[-1]), generator=generator)
    unpacking = {"values": values, "cu_seqlens": cu, "num_values": total, **{k: arguments[k] for k in fields}}
    compare(torch.ops.megarl.unpack_values, unpacking, 0.0)
