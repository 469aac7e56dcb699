"""Run on the fake GPU: torch's operators against a CPU, in float64 where they have an own implementation.

Prints one JSON line: the largest relative difference of each, and what must be true.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

Difference = dict[str, float]


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours.detach().cpu().double() - expected.detach()).abs().max() / expected.abs().max()).item()


def gradients(f: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of a weighted sum of it."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = f(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return [out, *torch.autograd.grad(out, leaves, weights)]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """By the definition; [batch, heads, tokens, width], masked where True."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(mask, float("-inf"))).softmax(-1) @ v


def worst(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(map(difference, ours, expected))


def check_attention() -> Difference:
    torch.manual_seed(0)
    found = {}
    q, k, v = torch.randn(2, 4, 9, 32), torch.randn(2, 2, 9, 32), torch.randn(2, 2, 9, 32)
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected = gradients(lambda q, k, v: attention(q, k, v, causal), [t.double() for t in (q, k, v)])
    for backend, dtype in (
        (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
        (SDPBackend.CUDNN_ATTENTION, torch.bfloat16),
        (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
    ):
        grouped = backend is not SDPBackend.EFFICIENT_ATTENTION
        keys = [k, v] if grouped else [t.repeat_interleave(2, 1) for t in (k, v)]
        with sdpa_kernel(backend):
            ours = gradients(
                lambda q, k, v, g=grouped: F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=g
                ),
                [t.to("cuda", dtype) for t in (q, *keys)],
            )
        if not grouped:
            ours = ours[:2] + [t.view(2, 2, 2, 9, 32).sum(2) for t in ours[2:]]
        found[f"attention {backend.name.lower()} {dtype}".replace("torch.", "")] = worst(ours, expected)

    bounds = torch.tensor([0, 5, 9, 12])
    q, k, v = torch.randn(12, 4, 32), torch.randn(12, 4, 32), torch.randn(12, 4, 32)

    def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = []
        for a, b in itertools.pairwise(bounds):
            mask = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
            rows = [t[a:b].transpose(0, 1)[None] for t in (q, k, v)]
            parts.append(attention(*rows, mask)[0].transpose(0, 1))
        return torch.cat(parts)

    on_device = bounds.to("cuda", torch.int32)
    ours = gradients(
        lambda q, k, v: varlen_attn(q, k, v, on_device, on_device, 5, 5, window_size=(-1, 0)),
        [t.to("cuda", torch.bfloat16) for t in (q, k, v)],
    )
    expected = gradients(packed, [t.double() for t in (q, k, v)])
    return found | {"attention varlen bfloat16": worst(ours, expected)}


def check_norm() -> Difference:
    x, w = torch.randn(3, 5, 16), torch.randn(16)
    ours = gradients(lambda x, w: F.rms_norm(x, (16,), w, 1e-6), [x.cuda(), w.cuda()])
    expected = gradients(
        lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w, [x.double(), w.double()]
    )
    return {"rms norm float32": worst(ours, expected)}


def check_training() -> Difference:
    """Loss, gradients and two AdamW steps of a small network; an out= argument that is resized."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 16), torch.nn.GELU())
    net.append(torch.nn.LayerNorm(16)).append(torch.nn.Linear(16, 11))
    ids, labels = torch.randint(0, 11, (4, 7)), torch.randint(0, 11, (28,))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        net.load_state_dict(state)
        model = net.to(device, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=device == "cuda")
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(ids.to(device)).flatten(0, 1), labels.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        out = torch.empty(0, dtype=dtype, device=device)
        torch.cat([p.detach().flatten()[:5] for p in model.parameters()], out=out)  # resized by the operator
        results.append([loss, out, *model.parameters()])
        net = model
    return {"two AdamW steps float32": worst(results[0], [t.detach().double() for t in results[1]])}


def check_random() -> dict[str, bool]:
    """A generator's saved state draws the same again; distributions are what they are called."""
    torch.cuda.manual_seed(3)
    first = torch.randn(5, device="cuda")
    state = torch.cuda.get_rng_state()
    second = torch.randn(5, device="cuda")
    torch.cuda.set_rng_state(state)
    again = torch.randn(5, device="cuda")
    torch.cuda.manual_seed(3)
    restarted = torch.randn(5, device="cuda")
    many = torch.rand(20_000, device="cuda")
    return {
        "restored": torch.equal(second, again),
        "seeded": torch.equal(first, restarted),
        "goes on": not torch.equal(first, second),
        "uniform": abs(many.mean().item() - 0.5) < 0.01 and abs(many.std().item() - 12**-0.5) < 0.01,
    }


def check_graph() -> dict[str, bool]:
    """A captured graph computes at replay only, on the inputs of then."""
    inputs, total = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")

    def work() -> torch.Tensor:
        total.add_(1)
        return (inputs * 2 + total).relu()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    captured = total.tolist()
    inputs.fill_(5)
    graph.replay()
    first = out.tolist()
    inputs.fill_(-7)
    graph.replay()
    return {
        "capture computes nothing": captured == [1] * 4,
        "replay": first == [12] * 4 and out.tolist() == [0] * 4 and total.tolist() == [3] * 4,
    }


def check_order() -> dict[str, bool]:
    """A launch takes the values of host tensors with it; so does a copy, unless they are pinned."""
    x, host = torch.zeros(3, device="cuda"), torch.tensor(2.0)
    x.add_(host)
    host.fill_(7)
    added = x.tolist()
    pageable = torch.ones(3)
    x.copy_(pageable, non_blocking=True)
    pageable.fill_(9)
    return {"host value": added == [2] * 3, "pageable copy": x.tolist() == [1] * 3}


def main() -> None:
    differences = check_attention() | check_norm() | check_training()
    print(json.dumps({"differences": differences, "true": check_random() | check_graph() | check_order()}))


if __name__ == "__main__":
    main()
