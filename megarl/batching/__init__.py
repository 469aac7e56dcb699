"""Batching: which sequences form a microbatch (plan), and its packed tensors (pack)."""

from megarl.batching.context_parallel import context_parallel_slice
from megarl.batching.microbatch_plan import CostModel, PackingPlan, plan_groups, plan_microbatches
from megarl.batching.pack import pack, unpack

__all__ = [
    "CostModel",
    "PackingPlan",
    "context_parallel_slice",
    "pack",
    "plan_groups",
    "plan_microbatches",
    "unpack",
]
