"""Which implementation each kind of layer gets, here and with these packages installed."""

from __future__ import annotations

from importlib.util import find_spec


def layer_implementations(
    device: str, dtype: str, *, experts: bool = True, ring: bool = False
) -> dict[str, str]:
    """Kind of layer -> who computes it, for ``device`` "cpu" or "cuda" and parameters of ``dtype``.

    Transformer Engine and Apex are taken where Megatron-Core takes them of its own accord, and left alone
    where they are not installed. Norms and matrix products are torch's in any case: the weights lie as the
    engine has them, which Transformer Engine's fused layers would not allow. Attention is its only where
    context-parallel ranks form a ``ring``.
    """
    engine = find_spec("transformer_engine") is not None
    fused = "Transformer Engine" if engine else "Apex" if find_spec("apex") is not None else "torch"
    found = {
        "attention": "Transformer Engine (ring over context-parallel ranks)"
        if ring
        else "torch (variable-length FlashAttention)"
        if device == "cuda" and dtype in ("bfloat16", "float16")
        else "torch (scaled_dot_product_attention per bucket of sequences)",
        "linear": "torch (Megatron-Core's parallel layers)",
        "norm": "torch",
        "head and loss": f"MegaRL's {device.upper()} kernels",
        "Adam": fused,
    }
    if experts:
        grouped = device == "cuda" and dtype == "bfloat16"
        found["experts"] = "torch (grouped GEMM)" if grouped else "torch (one expert after another)"
        found["router"] = "Transformer Engine" if engine else "torch"
    return found
