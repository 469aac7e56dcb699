"""Control messages between ranks: over gloo on every platform, and in one module alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.world import world

PACKAGE = Path(__file__).parents[2] / "megarl"
# Functions of torch.distributed that pickle or wait: over NCCL, on the GPU.
CONTROL = {
    *("barrier", "monitored_barrier", "broadcast_object_list", "all_gather_object", "gather_object"),
    *("scatter_object_list", "send_object_list", "recv_object_list"),
}


def control_calls(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each use of one of ``CONTROL``: as an attribute of a module, or imported by name."""
    modules = {"distributed"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            by_name = isinstance(node, ast.ImportFrom) and node.module == "torch.distributed"
            for alias in node.names:
                if alias.name.endswith("distributed"):
                    modules.add(alias.asname or "distributed")
                if by_name and alias.name in CONTROL:
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Attribute) and node.attr in CONTROL:
            module = ast.unparse(node.value).rpartition(".")[2]
            if module in modules:
                yield node.lineno, node.attr


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch.distributed.barrier()", ["barrier"]),
        (
            "import torch.distributed as d\ndef f():\n    d.all_gather_object([], 1, group=g)",
            ["all_gather_object"],
        ),
        ("from torch.distributed import broadcast_object_list as send", ["broadcast_object_list"]),
        ("from torch import distributed\nuse(distributed.gather_object)", ["gather_object"]),
        ("import torch.distributed as dist\ndist.all_reduce(x)\ncollectives.barrier()\nbarrier()", []),
    ],
)
def test_the_search_finds_what_it_is_for(source: str, found: list[str]) -> None:
    assert [name for _, name in control_calls(source)] == found


def test_nothing_else_sends_values_or_waits() -> None:
    stray = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "cluster" / "collectives.py"
        for line, name in control_calls(path.read_text())
    ]
    assert stray == [], "use megarl.cluster.collectives"


def every_call(context: Any) -> dict[str, Any]:
    """Return each function's result on this rank, and the groups used."""
    import torch.distributed as dist

    from megarl.cluster import collectives

    over = []
    real = {name: getattr(dist, name) for name in (*CONTROL, "send", "recv", "broadcast")}

    def watched(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            over.append(options.get("group"))
            return real[name](*arguments, **options)

        return call

    for name in real:
        setattr(dist, name, watched(name))
    try:
        rank = context.rank
        found = {
            "gather": collectives.gather({"rank": rank}),
            "to_first": collectives.gather_to_first_rank(rank),
            "broadcast": collectives.broadcast(f"of {rank}"),
            "from_first": collectives.from_first_rank(lambda: rank + 10),
            "on_first": collectives.on_first_rank(lambda: rank + 20),
        }
        collectives.barrier()
        tensor = torch.full((3, 2), rank + 0.5, dtype=torch.bfloat16)
        if rank == 0:
            found["tensors"] = [collectives.receive(other, (3, 2), torch.bfloat16) for other in (1, 2)]
        else:
            collectives.send_to_first_rank(tensor.t().contiguous().t())  # not contiguous
        arrays = {
            "odd": np.arange(5, dtype=np.uint8),
            "absent": None,
            "choices": np.arange(12, dtype=np.int16).reshape(2, 3, 2)[:, ::-1],  # not contiguous
            "empty": np.zeros((0, 3), dtype=np.float32),
            "doubles": np.array([0.1, np.nan]),
        }
        found["broadcast_arrays"] = collectives.broadcast_arrays(arrays if rank == 0 else None)
        if rank == 0:
            found["bytes"] = [collectives.send_arrays(arrays, other) for other in (1, 2)]
        else:
            found["sent_arrays"] = collectives.receive_arrays(0)
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
    default = dist.distributed_c10d._get_default_group()
    [group] = {id(each): each for each in over}.values()
    return found | {
        "calls": len(over),
        "own group": group is not None and group is not default,
        "backend": dist.get_backend(group),
        "size": dist.get_world_size(group),
        "hours": group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 3600,
    }


def test_values_go_around_over_gloo_and_are_waited_for_without_limit() -> None:
    ranks = world(3).run(every_call)
    for number, rank in enumerate(ranks):
        assert rank["gather"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert rank["to_first"] == ([0, 1, 2] if number == 0 else [])
        assert rank["broadcast"] == "of 0"
        assert rank["from_first"] == 10
        assert rank["on_first"] == (20 if number == 0 else None)
        assert rank["calls"] >= 7
        assert rank["own group"] and rank["backend"] == "gloo" and rank["size"] == 3
        assert rank["hours"] > 24 * 7
    choices = np.arange(12).reshape(2, 3, 2)[:, ::-1].tolist()
    for arrays in [rank["broadcast_arrays"] for rank in ranks] + [rank["sent_arrays"] for rank in ranks[1:]]:
        assert list(arrays) == ["odd", "choices", "empty", "doubles"]
        assert [values.dtype for values in arrays.values()] == [np.uint8, np.int16, np.float32, np.float64]
        assert arrays["odd"].tolist() == [0, 1, 2, 3, 4] and arrays["choices"].tolist() == choices
        assert arrays["empty"].shape == (0, 3) and np.array_equal(arrays["doubles"], [0.1, np.nan], True)
    assert ranks[0]["bytes"] == [5 + 24 + 16] * 2
    for other, tensor in zip((1, 2), ranks[0]["tensors"], strict=True):
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, torch.full((3, 2), other + 0.5, dtype=torch.bfloat16))


def exported(context: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Two tensors that ranks hold parts or copies of, and the number of pickled values."""
    import torch.distributed as dist

    from megarl.models.table import Region
    from megarl.trainer import weights

    rows, columns = 6, 4
    whole = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    part = rows // context.layout.tensor
    start = context.at.tensor * part
    params = {"p": whole[start : start + part].clone(), "q": whole[0].clone().bfloat16()}
    held = [
        Region(
            hf="split", box=((start, start + part), (0, columns)), param="p", index=((0, part), (0, columns))
        )
    ]
    if context.at.tensor == 0:
        held.append(Region(hf="first", box=((0, columns),), param="q", index=((0, columns),)))
    pickled = []
    real = dist.distributed_c10d._object_to_tensor

    def measured(value: Any, *rest: Any) -> Any:
        pickled.append(value)
        return real(value, *rest)

    dist.distributed_c10d._object_to_tensor = measured
    try:
        shapes = {"split": (rows, columns), "first": (columns,)}
        found = weights.gather_tensors(context, shapes, held, params, lambda _: context.at.data == 0)
        return dict(found), len(pickled)
    finally:
        dist.distributed_c10d._object_to_tensor = real


@pytest.mark.parametrize("layout", [{"tensor_parallel_size": 2}, {}], ids=["tp2", "dp2"])
def test_tensors_for_a_file_travel_as_tensors(layout: dict[str, Any]) -> None:
    """Each is sent once, from its first replica; only the table of holders is pickled, once for all."""
    (found, num_pickled), (elsewhere, _) = world(2).run(exported, parallel=layout)
    assert torch.equal(found["split"], torch.arange(24.0).reshape(6, 4))
    assert found["first"].dtype == torch.bfloat16 and found["first"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert elsewhere == {}
    assert num_pickled == 1
