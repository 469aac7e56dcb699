"""Triton kernels without a GPU: by Triton's interpreter, and the slow ones by torch.

The interpreter copies tensors to the CPU and back. Device memory is host memory here, so aliases do instead.
While the stream captures, the kernel becomes a node of the graph; with lazy streams it waits for its stream.
A kernel named in BY_TORCH is not interpreted: a function gets the arguments of its launch and writes what the
kernel writes.
"""

from __future__ import annotations

import ctypes
import inspect
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def unified_attention(a: dict[str, Any]) -> bool:
    """VLLM's attention over pages (kernel_unified_attention), which float32 engines use."""
    plain = not (a["USE_ALIBI_SLOPES"] or a["USE_QQ_BIAS"] or a["USE_SINKS"] or a["USE_MM_PREFIX"])
    plain = plain and not (a["USE_R_SWA"] or a["USE_PER_SEQ_CAUSAL"] or a["KV_QUANT_MODE"])
    if not plain or a["CHUNK_LOOKBACK"] >= 0:
        return False  # the interpreter takes it
    query = a["query_ptr"]
    segmented = a["IS_3D"]
    out = torch.empty_like(query) if segmented else a["output_ptr"]
    torch.ops.fakecuda.paged_attention(
        query,
        a["key_cache_ptr"],
        a["value_cache_ptr"],
        out,
        a["query_start_len_ptr"][: a["num_seqs"] + 1],
        a["seq_lens_ptr"],
        a["block_tables_ptr"],
        a["scale"],
        a["USE_CAUSAL"],
        a["SLIDING_WINDOW"] - 1,
        a["softcap"],
    )
    if segmented:
        # Every program has a share of the keys, and reduce_segments adds them up. Here the first has all.
        a["segm_output_ptr"][: len(out)] = 0
        a["segm_output_ptr"][: len(out), :, 0, : out.shape[-1]] = out
        a["segm_max_ptr"][: len(out)] = 0
        a["segm_expsum_ptr"][: len(out)] = 0
        a["segm_expsum_ptr"][: len(out), :, 0] = 1
    return True


def reduce_segments(a: dict[str, Any]) -> bool:
    """The sum of the segments, of which unified_attention above writes one."""
    if a["USE_FP8"]:
        return False
    out = a["output_ptr"]
    parts = a["segm_output_ptr"][: len(out), ..., : out.shape[-1]].sum(2)
    out.copy_(parts / a["segm_expsum_ptr"][: len(out)].sum(2, keepdim=True))
    return True


def write_cache(a: dict[str, Any]) -> bool:
    """Keys and values to their slots (reshape_and_cache_kernel_flash); a negative slot is padding."""
    if a["FP8_KV_CACHE"] or a["USE_HEAD_MAJOR_LAYOUT"]:
        return False
    slots = a["slot_mapping_ptr"].long()
    used = (slots >= 0).nonzero().flatten()
    page, within = slots[used] // a["block_size"], slots[used] % a["block_size"]
    for name in ("key", "value"):
        cache, new = a[f"{name}_cache_ptr"], a[f"{name}_ptr"]
        cache[page, within] = new[used].to(cache.dtype)
    return True


def fused_moe(a: dict[str, Any]) -> bool:
    """VLLM's product with experts (fused_moe_kernel): row r of C is A[r // top_k] times its expert's B."""
    if a["use_fp8_w8a8"] or a["use_int8_w8a8"] or a["use_int8_w8a16"] or a["SPLIT_K"] != 1:
        return False
    hidden, weights, out = a["a_ptr"], a["b_ptr"], a["c_ptr"].view(-1, a["c_ptr"].shape[-1])
    block, valid = a["BLOCK_SIZE_M"], a["num_valid_tokens"]
    experts = a["expert_ids_ptr"].long()
    if a["naive_block_assignment"]:  # block i is row i
        rows = torch.arange(valid)
        expert = experts[:valid]
    else:
        rows = a["sorted_token_ids_ptr"][: int(a["num_tokens_post_padded_ptr"])].long()
        expert = experts[torch.arange(len(rows)) // block]
        rows, expert = rows[rows < valid], expert[rows < valid]
    for number in expert.unique().tolist():
        chosen = rows[expert == number]
        if number < 0:  # an expert of another rank
            out[chosen] = 0
            continue
        result = hidden[chosen // a["top_k"]].float() @ weights[number].float().T
        if a["HAS_BIAS"]:
            result += a["b_bias_ptr"][number].float()
        if a["MUL_ROUTED_WEIGHT"]:
            result *= a["topk_weights_ptr"].flatten()[chosen, None].float()
        out[chosen] = result.to(out.dtype)
    return True


# By the kernel's name; False from one of them leaves the launch to the interpreter.
BY_TORCH: dict[str, Callable[[dict[str, Any]], bool]] = {
    "kernel_unified_attention": unified_attention,
    "reduce_segments": reduce_segments,
    "reshape_and_cache_kernel_flash": write_cache,
    "fused_moe_kernel": fused_moe,
}


def install(interpreter: Any, runtime: ctypes.CDLL) -> None:
    """Patch triton.runtime.interpreter; ``runtime`` is the fake libcudart."""
    executor = interpreter.GridExecutor
    enqueue = runtime.fakecuda_enqueue
    enqueue.argtypes = [ctypes.c_void_p, _CALLBACK, ctypes.c_void_p, ctypes.c_void_p]
    runtime.fakecuda_is_capturing.argtypes = [ctypes.c_void_p]
    interpret = executor.__call__
    kept: list[Any] = []  # callbacks of graphs, which live as long as the process

    def to_host(value: Any) -> Any:
        if isinstance(value, tuple):
            return interpreter._tuple_create(value, map(to_host, value))
        if isinstance(value, interpreter.TensorDescriptor):
            rest = (value.shape, value.strides, value.block_shape, value.padding, value.round_f32_to_tf32)
            return interpreter.TensorDescriptor(to_host(value.base), *rest)
        tensor = interpreter._unwrap_tensor(value) if hasattr(value, "data_ptr") else None
        if tensor is None or not tensor.is_cuda:
            return value
        return interpreter._rewrap_tensor(torch.ops.fakecuda.host_alias(tensor), original_tensor=value)

    def run(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_torch = BY_TORCH.get(self.fn.__name__)
        if by_torch is not None:
            names = inspect.signature(self.fn).parameters
            bound = inspect.signature(self.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in names})
            bound.apply_defaults()
            with torch.no_grad():
                if by_torch(bound.arguments):
                    return
        interpret(self, *args, **kwargs)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        runtime.fakecuda_count(f"triton {self.fn.__name__}".encode())
        args, kwargs = tuple(map(to_host, args)), {name: to_host(value) for name, value in kwargs.items()}
        capturing = runtime.fakecuda_any_capture()
        if not capturing and not runtime.fakecuda_lazy():
            run(self, args, kwargs)
            return
        stream = torch.cuda.current_stream().cuda_stream
        if not runtime.fakecuda_is_capturing(stream):
            # The interpreter's state is one per process: no two kernels at a time.
            torch.cuda.current_stream().synchronize()
            run(self, args, kwargs)
            return

        def node(_: Any) -> None:
            try:
                run(self, args, kwargs)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                ctypes.CDLL(None).abort()

        kept.append(_CALLBACK(node))
        enqueue(stream, kept[-1], None, None)

    executor._init_args_hst = lambda self, args, kwargs: (list(args), kwargs)
    executor._restore_args_dev = lambda self, *args: None
    executor.__call__ = launch
