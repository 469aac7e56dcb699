"""Run on the fake GPU: vLLM's operators and Triton kernels against their definition in float64.

Prints one JSON line: the largest relative difference of each.
"""

from __future__ import annotations

import json

import torch
import vllm._C_stable_libtorch
import vllm._moe_C_stable_libtorch  # noqa: F401
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import fused_experts
from vllm.v1.attention.ops.triton_unified_attention import unified_attention
from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

from tests.fake_cuda.scenarios.operators_torch import attention, difference


def check_elementwise() -> dict[str, float]:
    x, residual, w = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    out, device_x, device_residual = torch.empty(5, 64, device="cuda"), x.cuda(), residual.cuda()
    ops.rms_norm(out, x.cuda(), w.cuda(), 1e-6)
    ops.fused_add_rms_norm(device_x, device_residual, w.cuda(), 1e-6)

    def norm(value: torch.Tensor) -> torch.Tensor:
        return value * (value.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w.double()

    total = x.double() + residual.double()
    gated, half = torch.randn(5, 64), torch.empty(5, 32, device="cuda")
    torch.ops._C.silu_and_mul(half, gated.cuda())
    a, b = gated.double().chunk(2, -1)
    found = {
        "rms_norm": difference(out, norm(x.double())),
        "fused_add_rms_norm": difference(device_x, norm(total)),
        "its residual": difference(device_residual, total),
        "silu_and_mul": difference(half, a * a.sigmoid() * b),
    }
    positions = torch.tensor([0, 3, 9, 4, 1])
    angles = torch.arange(12)[:, None] * 10000.0 ** (-torch.arange(16) / 16)
    table = torch.cat([angles.cos(), angles.sin()], -1)
    for neox in (True, False):
        q = torch.randn(5, 2 * 40)
        turned = q.cuda()
        ops.rotary_embedding(positions.cuda(), turned, None, 40, table.cuda(), neox)
        # As complex numbers: the first 32 of each head's 40 channels, halves or neighbours paired.
        heads = q.double().view(5, 2, 40)
        first = heads[..., :32]
        pairs = first.view(5, 2, 2, 16).transpose(-2, -1) if neox else first.view(5, 2, 16, 2)
        rotation = torch.polar(torch.ones(5, 1, 16).double(), angles[positions].double()[:, None])
        result = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * rotation)
        result = (result.transpose(-2, -1) if neox else result).reshape(5, 2, 32)
        found[f"rotary_embedding neox={neox}"] = difference(
            turned, torch.cat([result, heads[..., 32:]], -1).flatten(1)
        )
    return found


def check_embedding() -> dict[str, float]:
    """Rank 1 of two: tokens 8 to 15 of 16, and 18 to 19 of four added ones, after 2 rows of padding."""
    weight = torch.randn(12, 8)
    ids = torch.tensor([0, 8, 15, 7, 18, 19, 17, 11])
    rows = [None, 0, 7, None, 10, 11, None, 3]
    expected = torch.stack([torch.zeros(8) if row is None else weight[row] for row in rows])
    out = ops.vocab_parallel_embedding(ids.cuda(), weight.cuda(), 8, 16, 2, 18, 20)
    return {"vocab_parallel_embedding": difference(out, expected.double())}


def check_paged_attention() -> dict[str, float]:
    """Three sequences, one of them decoding, whose keys and values lie in scattered pages of 16."""
    torch.manual_seed(0)
    lengths, queries, page = [20, 37, 5], [20, 1, 5], 16
    keys = [torch.randn(n, 2, 32) for n in lengths]
    values = [torch.randn(n, 2, 32) for n in lengths]
    asked = [torch.randn(n, 4, 32) for n in queries]
    expected = []
    for q, k, v in zip(asked, keys, values, strict=True):
        shift = len(k) - len(q)
        hidden = torch.arange(len(k)) > torch.arange(len(q))[:, None] + shift
        rows = [t.double().transpose(0, 1)[None] for t in (q, k, v)]
        expected.append(attention(*rows, hidden)[0].transpose(0, 1))
    pages = torch.tensor([[7, 2, 0], [1, 5, 3], [6, 0, 0]])
    slots = torch.cat(
        [
            table[torch.arange(n) // page] * page + torch.arange(n) % page
            for table, n in zip(pages, lengths, strict=True)
        ]
    )
    bounds = torch.tensor([0, 20, 21, 26], dtype=torch.int32, device="cuda")
    found = {}
    for name, dtype in (("flash 3", torch.bfloat16), ("flash 2", torch.bfloat16), ("triton", torch.float32)):
        k_cache = torch.zeros(8, page, 2, 32, dtype=dtype, device="cuda")
        v_cache = torch.zeros_like(k_cache)
        one = torch.ones((), device="cuda")
        new = [torch.cat(t).to("cuda", dtype) for t in (keys, values)]
        torch.ops._C_cache_ops.reshape_and_cache_flash(*new, k_cache, v_cache, slots.cuda(), "auto", one, one)
        q = torch.cat(asked).to("cuda", dtype)
        used = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        tables = pages.to("cuda", torch.int32)
        common = {"max_seqlen_q": 20, "softmax_scale": 32**-0.5, "causal": True, "block_table": tables}
        if name == "triton":
            out = torch.empty_like(q)
            unscaled = {"q_descale": None, "k_descale": None, "v_descale": None, "softcap": 0}
            every = {"seqused_k": used, "max_seqlen_k": 37, "window_size": (-1, -1)}
            unified_attention(q, k_cache, v_cache, out, bounds, **every, **unscaled, **common)
        else:
            out = flash_attn_varlen_func(
                q, k_cache, v_cache, cu_seqlens_q=bounds, max_seqlen_k=37, seqused_k=used,
                fa_version=int(name[-1]), **common,
            )  # fmt: skip
        found[f"paged attention {name}"] = difference(out, torch.cat(expected))
    return found


def check_experts() -> dict[str, float]:
    """Routing, grouping, the two products and the sum, against one expert after another."""
    torch.manual_seed(0)
    tokens, hidden, inner, count, top_k = 37, 32, 48, 4, 2
    x, logits = torch.randn(tokens, hidden), torch.randn(tokens, count)
    w1, w2 = torch.randn(count, 2 * inner, hidden), torch.randn(count, hidden, inner)
    weights = torch.empty(tokens, top_k, device="cuda")
    chosen, rows = (torch.empty(tokens, top_k, dtype=torch.int32, device="cuda") for _ in range(2))
    ops.topk_softmax(weights, chosen, rows, logits.cuda(), True)
    with set_current_vllm_config(VllmConfig()):
        out = fused_experts(x.cuda(), w1.cuda(), w2.cuda(), weights, chosen)
    probabilities, best = logits.double().softmax(-1).topk(top_k, -1)
    probabilities /= probabilities.sum(-1, keepdim=True)
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for share, expert in zip(probabilities[token], best[token], strict=True):
            gate, up = (w1[expert].double() @ x[token].double()).chunk(2)
            expected[token] += share * (w2[expert].double() @ (gate * gate.sigmoid() * up))
    assert torch.equal(chosen.cpu(), best.int())
    return {"topk_softmax": difference(weights, probabilities), "fused experts": difference(out, expected)}


def main() -> None:
    print(
        json.dumps(
            {
                "differences": check_elementwise()
                | check_embedding()
                | check_paged_attention()
                | check_experts()
            }
        )
    )


if __name__ == "__main__":
    main()
