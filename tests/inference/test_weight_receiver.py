"""Weight plans against plain torch parameters: every violation is found, valid plans are executed."""

from __future__ import annotations

import torch

from megarl.inference.weight_receiver import AttachedWeights, check_plan
from megarl.weights.sync_plan import Alias, Copy, SharedStorage, SourceView, WeightPlan


def shared(tensor: torch.Tensor) -> SharedStorage:
    return SharedStorage(tensor.untyped_storage()._share_filename_cpu_())


def test_aliases_follow_the_owner_and_copies_wait_for_copy() -> None:
    owner = torch.arange(24, dtype=torch.float32)
    half = torch.arange(8, dtype=torch.bfloat16)
    plan = WeightPlan(
        [shared(owner), shared(half)],
        [Alias("aliased", SourceView(0, "float32", 4, (2, 3), (3, 1)))],
        [
            # Rows 0:2 from every second element, row 2 as an int index, from another storage and dtype.
            Copy("copied", ((0, 2), (0, 4)), SourceView(0, "float32", 0, (2, 4), (8, 2))),
            Copy("copied", (2, (0, 4)), SourceView(1, "bfloat16", 4, (4,), (1,))),
        ],
    )
    params = {
        "aliased": torch.nn.Parameter(torch.zeros(2, 3)),
        "copied": torch.nn.Parameter(torch.zeros(3, 4)),
    }
    assert check_plan(plan, params) == []
    attached = AttachedWeights(plan, params)
    report = attached.report()
    assert (report.aliased, report.copied) == (["aliased"], ["copied"])
    assert (report.aliased_bytes, report.copied_bytes) == (24, 48)

    owner.mul_(10)
    assert params["aliased"].tolist() == [[40, 50, 60], [70, 80, 90]]
    assert not params["copied"].any()
    assert attached.copy_() == 48
    assert params["copied"].tolist() == [[0, 20, 40, 60], [80, 100, 120, 140], [4, 5, 6, 7]]


def test_every_violation_is_named_at_once() -> None:
    storage = SharedStorage((b"manager", b"name", 64))  # never mapped by a check
    whole = SourceView(0, "float32", 0, (4, 4), (4, 1))
    row = SourceView(0, "float32", 0, (4,), (1,))
    params = {name: torch.zeros(4, 4) for name in ("twice", "overlap", "hole", "outside", "shape", "good")}
    plan = WeightPlan(
        [storage],
        [
            Alias("twice", whole),
            Alias("outside", SourceView(0, "float32", 1, (4, 4), (4, 1))),
            Alias("shape", SourceView(0, "float16", 0, (4, 2), (2, 1))),
            Alias("stranger", whole),
            Alias("good", whole),
        ],
        [
            Copy("twice", ((0, 4), (0, 4)), whole),
            Copy("overlap", ((0, 3), (0, 4)), SourceView(0, "float32", 0, (3, 4), (4, 1))),
            Copy("overlap", (2, (0, 4)), row),
            Copy("overlap", (3, (0, 4)), SourceView(3, "float32", 0, (4,), (1,))),
            Copy("hole", (0, (0, 4)), row),
            Copy("hole", (4, (0, 4)), row),
            Copy("hole", ((0, 1),), row),
            Copy("hole", (1, (0, 2)), row),
        ],
    )
    assert sorted(check_plan(plan, params)) == sorted(
        [
            "stranger: no such parameter in the engine",
            "twice: written twice",
            "outside: source ends at byte 68 of storage 0, which has 64",
            "shape: alias has shape (4, 2), the engine wants (4, 4)",
            "shape: alias has dtype float16, the engine wants float32",
            "overlap: source names storage 3, the plan has 1",
            "overlap: regions ((0, 3), (0, 4)) and ((2, 3), (0, 4)) overlap",
            "hole: copy index (4, (0, 4)) lies outside the engine's shape (4, 4)",
            "hole: copy index ((0, 1),) has 1 dimensions, the engine 2",
            "hole: copy source has shape (4,), its region (1, (0, 2)) has (2,)",
            "hole: 6 of 16 elements are covered",
        ]
    )
