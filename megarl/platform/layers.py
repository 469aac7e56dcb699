"""Report the implementation of each kind of layer on this platform, with the installed packages."""

from __future__ import annotations

from importlib.util import find_spec


def layer_implementations(
    device: str, dtype: str, *, experts: bool = True, ring: bool = False
) -> dict[str, str]:
    """Return implementation by kind of layer, for ``device`` "cpu" or "cuda" and parameters of ``dtype``.

    Transformer Engine and Apex are used where Megatron-Core uses them by default, if they are installed.
    Norms and matrix products always use torch: the weights are stored as in the engine, which Transformer
    Engine's fused layers would not allow. It computes attention only where context-parallel ranks form a
    ``ring``.
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
