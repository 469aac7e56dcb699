"""Packing: which sequences form a microbatch (plan), and the tensors they become (pack)."""

from megarl.packing.context_parallel import context_parallel_slice
from megarl.packing.pack import pack, unpack
from megarl.packing.plan import CostModel, PackingPlan, plan_groups, plan_microbatches

__all__ = [
    "CostModel",
    "PackingPlan",
    "context_parallel_slice",
    "pack",
    "plan_groups",
    "plan_microbatches",
    "unpack",
]
