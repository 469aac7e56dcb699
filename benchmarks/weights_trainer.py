"""The trainer of benchmarks/weights.py: ranks that hold a model under one layout and answer commands.

Started as ``python -m benchmarks.weights_trainer ADDRESS MODEL_DIR LAYOUT PORT RANKS RANK``. Its ``gather``
is the usual colocated weight sync, for comparison: every rank assembles every full Hugging Face tensor, and
rank 0 puts them into a bucket of shared memory that the engine loads from.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import Implementation, peak_extra_bytes
from megarl.config.model import ModelConfig
from megarl.config.parallel import ParallelConfig
from megarl.models import load_architecture
from megarl.models.table import Region
from megarl.weights.hf import region_index

BUCKET_BYTES = 256 * 2**20
"""Size of the weight sync bucket; the compared systems use some hundred MiB to a few GiB."""


class GatherAll:
    """Assemble full tensors on every rank, one after another, in buckets."""

    def __init__(self, policy: Any, engine: Connection | None) -> None:
        self._params, self._engine = policy.params, engine
        offers: list[list[Region]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(offers, policy.regions)
        self._pieces: dict[str, list[tuple[int, Region]]] = {}
        for rank, regions in enumerate(offers):
            for region in regions:
                pieces = self._pieces.setdefault(region.hf, [])
                if all(region.box != other.box for _, other in pieces):  # replicas are sent once
                    pieces.append((rank, region))
        self._shapes = policy.architecture.hf_shapes()

    def __call__(self) -> None:
        """Sync the whole model once."""
        bucket = torch.empty(0)
        if self._engine is not None:
            storage = torch.UntypedStorage._new_shared(BUCKET_BYTES)
            bucket = torch.empty(0).set_(storage)
            self._engine.send(("bucket", storage._share_filename_cpu_()))
            self._engine.recv()
        entries: list[tuple[str, int, tuple[int, ...]]] = []
        used = 0
        for name, tensor in self._full_tensors():
            if self._engine is None:
                continue
            if used + tensor.numel() > bucket.numel():
                self._send_bucket(entries)
                entries, used = [], 0
            bucket[used : used + tensor.numel()] = tensor.flatten()
            entries.append((name, used, tuple(tensor.shape)))
            used += tensor.numel()
        if self._engine is not None:
            self._send_bucket(entries)

    def _send_bucket(self, entries: list[tuple[str, int, tuple[int, ...]]]) -> None:
        assert self._engine is not None
        self._engine.send(("load", entries))
        self._engine.recv()  # the bucket may be overwritten

    def _full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        rank = dist.get_rank()
        for name, shape in self._shapes.items():
            whole = torch.empty(shape)
            for owner, region in self._pieces[name]:
                box = tuple(slice(*span) for span in region.box)
                if rank == owner:
                    piece = self._params[region.param].detach()[region_index(region.index)].contiguous()
                else:
                    piece = torch.empty([stop - start for start, stop in region.box])
                if dist.get_world_size() > 1:
                    dist.broadcast(piece, src=owner)
                whole[box] = piece
            yield name, whole


def serve(address: str, model_dir: str, rank: int, layout: dict[str, Any]) -> None:
    """Answer ``offer`` (the weight owners), ``gather``, ``gather_peak`` (bytes), until ``stop``."""
    from megarl.trainer.megatron.initialize import finalize, initialize

    context = initialize(ParallelConfig(**layout), seed=1)
    from megarl.trainer.megatron.trainer import MegatronTrainer  # imports megatron.core

    policy = MegatronTrainer(context, load_architecture(model_dir), ModelConfig(path=model_dir))
    with Client(address) as connection:
        connection.send(rank)
        gather = GatherAll(policy, connection if rank == 0 else None)
        while True:
            command = connection.recv()
            if command == "stop":
                break
            if command == "offer":
                connection.send(("answer", policy.weights.owners()))
            elif command == "gather":
                gather()
                connection.send(("answer", None))
            elif command == "gather_peak":
                connection.send(("answer", peak_extra_bytes(Implementation("gather", gather))))
    finalize()


if __name__ == "__main__":
    address, model_dir, layout, port, world, rank = sys.argv[1:]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    serve(address, model_dir, int(rank), json.loads(layout))
