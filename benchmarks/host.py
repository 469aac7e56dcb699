"""The host's share of a GRPO step: ``python -m benchmarks host --json FILE [--quick]``.

No model and no engine: 4,096 samples of up to 8,192 response tokens, seen by rank 0 of 64 data ranks and by
another rank. Rank 0 goes from the engine's answers (arrays) to samples, metrics, advantages, the batch, the
plan and the 63 shares sent as bytes, and packs its own; the other rank goes from the bytes to its
microbatches. In one process and one thread: sent bytes stay in memory, decoding of text is left out. A first
repetition measures memory: the peak growth of the resident set. Seconds are medians of the others; those of
the ratios are the thread's CPU time (``cpu_seconds``), unaffected by other work on the machine.

``transport`` rows are real: four local processes, two of them data ranks with a tensor rank each, and the
bytes passed to gloo compared with those of the shares.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from megarl.algorithms.grpo_advantages import give_advantages

from megarl.batching import rank_microbatches
from megarl.batching.microbatch_plan import CostModel
from megarl.batching.rank_microbatches import BatchMaker, PackedStep
from megarl.cluster import collectives
from megarl.config.grpo import GrpoAlgorithmConfig
from megarl.config.packing import PackingConfig
from megarl.inference.interface import GeneratedResponse
from megarl.layout import ParallelLayout
from megarl.loops import minibatches
from megarl.loops.minibatches import MiniBatch
from megarl.loops.online_metrics import rollout_metrics
from megarl.records import Group, Prompt, Sample, TrainBatch

Row = dict[str, Any]

NUM_PROMPTS, GENERATIONS, LONGEST, NUM_RANKS, OTHER = 512, 8, 8192, 64, 17
BUDGET = 16_384
ALGORITHM = GrpoAlgorithmConfig()


@dataclass(frozen=True)
class Answers:
    """The engine's answers of one step."""

    prompts: list[Prompt]
    responses: list[list[GeneratedResponse]]  # per prompt

    @property
    def num_tokens(self) -> int:
        """Return the number of prompt and response tokens of all samples."""
        return sum(
            len(prompt.token_ids) + len(response.token_ids)
            for prompt, group in zip(self.prompts, self.responses, strict=True)
            for response in group
        )


def make_answers(num_prompts: int) -> Answers:
    """Return answers with lengths spread evenly up to the longest, prompts of 50 to 400 tokens."""
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(i, "", rng.integers(1, 150_000, rng.integers(50, 401)).astype(np.int32))
        for i in range(num_prompts)
    ]

    def response(name: str) -> GeneratedResponse:
        length = int(rng.integers(1, LONGEST + 1))
        ids = rng.integers(1, 150_000, length).astype(np.int32)
        logprobs = -rng.random(length, dtype=np.float32)
        return GeneratedResponse(name, ids, logprobs, "length" if length == LONGEST else "stop", 0)

    responses = [[response(f"{i}-{g}") for g in range(GENERATIONS)] for i in range(num_prompts)]
    return Answers(prompts, responses)


@dataclass
class Wire:
    """Stand-in for the group of ranks: shares are serialised as if sent; one of them is kept."""

    layout: ParallelLayout
    facts: Any = None
    kept: tuple[np.ndarray, int] | None = None
    num_bytes: int = 0
    num_sent: int = 0

    def send(self, arrays: dict[str, np.ndarray | None], to: int) -> int:
        """Like collectives.send_arrays, up to the socket."""
        message, header, num_bytes = collectives.packed_arrays(arrays)
        if to == self.layout.rank_of(data=OTHER, context=0):
            self.kept = message, header
        self.num_bytes += num_bytes
        self.num_sent += 1
        return num_bytes

    def receive(self, _source: int) -> dict[str, np.ndarray]:
        """Like collectives.receive_arrays, from the socket on: into new memory."""
        assert self.kept is not None
        message, header = self.kept
        return collectives.unpacked_arrays(message.copy(), header)

    def from_first_rank(self, make: Callable[[], Any]) -> Any:
        """Return rank 0's small figures of the plan."""
        self.facts = make()
        return dict(self.facts)


def as_rank_0(answers: Answers, layout: ParallelLayout, wire: Wire) -> tuple[PackedStep, list[Group]]:
    """Go from the engine's answers to the sent shares and rank 0's own microbatches."""
    groups = []
    for prompt, responses in zip(answers.prompts, answers.responses, strict=True):
        samples = [
            Sample(
                prompt.index,
                prompt.token_ids,
                response.token_ids,
                response.logprobs,
                response.policy_version,
                response.finish_reason,
                reward=float((prompt.index + number) % 3 == 0),
                version_spans=response.version_spans,
            )
            for number, response in enumerate(responses)
        ]
        groups.append(Group(prompt, samples))
    rollout_metrics(groups)

    def advantages(parts: list[MiniBatch]) -> dict[str, float]:
        return give_advantages(groups, parts, ALGORITHM, max_new_tokens=LONGEST)

    [part], _ = minibatches.make(groups, 1, then=advantages)
    with (
        patch.object(rank_microbatches, "send_arrays", wire.send),
        patch.object(rank_microbatches, "from_first_rank", wire.from_first_rank),
    ):
        step = maker_of(layout, 0).prepare(
            part.batch, ALGORITHM.loss_aggregation, advantages=part.advantages, scatter=True
        )
    return step, groups


def as_another_rank(layout: ParallelLayout, wire: Wire) -> PackedStep:
    """Go from the received bytes to the microbatches."""
    rank = layout.rank_of(data=OTHER, context=0)
    with (
        patch.object(rank_microbatches, "receive_arrays", wire.receive),
        patch.object(rank_microbatches, "from_first_rank", lambda _: dict(wire.facts)),
    ):
        return maker_of(layout, rank).prepare(None, ALGORITHM.loss_aggregation, scatter=True)


def maker_of(layout: ParallelLayout, rank: int) -> BatchMaker:
    """Return a batch maker with the packing of a GPU's microbatches."""
    packing = PackingConfig(max_tokens_per_microbatch=BUDGET)
    return BatchMaker(layout, rank, "cpu", packing, CostModel.transformer(4096))


def peak_growth(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return the call's result, and the peak growth of the resident set in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory cached by the allocator would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    result = call()
    return result, _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


def host_rows(num_prompts: int, repeats: int) -> list[Row]:
    """Measure both kinds of rank, on the same step."""
    torch.set_num_threads(1)
    layout = ParallelLayout(data=NUM_RANKS)
    # A small warm-up: lazy loading and first-use allocations are not part of a step.
    small, wire = make_answers(NUM_RANKS), Wire(layout)
    as_rank_0(small, layout, wire)
    as_another_rank(layout, wire)
    answers = make_answers(num_prompts)
    tokens = answers.num_tokens
    found: dict[str, Row] = {}
    calls: dict[str, Callable[[Wire], Any]] = {
        "rank 0": lambda wire: as_rank_0(answers, layout, wire),
        "another rank": lambda wire: as_another_rank(layout, wire),
    }
    wire = Wire(layout)
    for name, call in calls.items():
        result, grown = peak_growth(lambda call=call, wire=wire: call(wire))  # type: ignore[misc]
        found[name] = {"op": "host", "case": name, "tokens": tokens, "peak_extra_bytes": grown}
        step: PackedStep = result[0] if isinstance(result, tuple) else result
        found[name]["own_tokens"] = int(step.offsets[-1])
        found[name]["microbatches"] = len(step.batches)
        del result, step
    found["rank 0"] |= {"bytes_sent": wire.num_bytes, "shares_sent": wire.num_sent}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        wire = Wire(layout)
        for name, call in calls.items():
            gc.collect()
            start, cpu_start = time.perf_counter(), time.thread_time()
            call(wire)
            cpu_seconds[name].append(time.thread_time() - cpu_start)
            seconds[name].append(time.perf_counter() - start)
    for name, row in found.items():
        row["seconds"] = statistics.median(seconds[name])
        row["cpu_seconds"] = statistics.median(cpu_seconds[name])
    return list(found.values())


# --- over gloo ----------------------------------------------------------------------------------------------


def transport_rank(rank: int, port: int, num_prompts: int, pipe: Connection) -> None:
    """Run one rank of a step that is really scattered; report the bytes sent and the time."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    layout = ParallelLayout(data=2, tensor=2)
    dist.init_process_group("gloo", rank=rank, world_size=layout.world_size)
    collectives.join()
    batch: TrainBatch | None = None
    if rank == 0:
        answers = make_answers(num_prompts)
        groups = [
            Group(
                prompt,
                [
                    Sample(prompt.index, prompt.token_ids, r.token_ids, r.logprobs, 0, "stop", reward=0.0)
                    for r in responses
                ],
            )
            for prompt, responses in zip(answers.prompts, answers.responses, strict=True)
        ]
        [part], _ = make_parts_alone(groups)
        batch = part.batch
    sent, real = [0], dist.send

    def send(tensor: torch.Tensor, *arguments: Any, **options: Any) -> None:
        sent[0] += tensor.nbytes
        real(tensor, *arguments, **options)

    collectives.barrier()
    start = time.perf_counter()
    with patch.object(dist, "send", send):
        step = maker_of(layout, rank).prepare(batch, "token", scatter=True)
    seconds = time.perf_counter() - start
    # Separately, the contents of a share: ids, mask and logprobs of its tokens.
    lengths = np.diff(step.offsets)
    pipe.send(
        {
            "rank": rank,
            "seconds": seconds,
            "sent": sent[0],
            "token_bytes": int(lengths.sum()) * (4 + 1 + 4),
            "bytes_sent": step.bytes_sent,
            "rows": step.rows.tolist(),
            "targets": float(sum(each.loss_mask.sum() for each in step.batches)),
            "all_targets": None if batch is None else int(batch.num_targets().sum()),
        }
    )
    collectives.leave()
    dist.destroy_process_group()


def make_parts_alone(groups: list[Group]) -> tuple[list[MiniBatch], dict[str, Any]]:
    """Make the mini-batches without the other ranks' participation."""
    with patch("megarl.loops.minibatches.from_first_rank", lambda make: make()):
        return minibatches.make(groups, 1)


def transport_rows(num_prompts: int) -> list[Row]:
    """Run four processes: data ranks 0 and 1 with two tensor ranks each."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(4):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=transport_rank, args=(rank, port, num_prompts, theirs)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    ranks = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    first, peer, other, other_peer = ranks
    for one, copy in ((first, peer), (other, other_peer)):
        assert one["rows"] == copy["rows"], "tensor ranks have the same"
    assert not set(first["rows"]) & set(other["rows"]), "data ranks have other sequences"
    assert first["targets"] + other["targets"] == first["all_targets"], "every target is somewhere"
    rows = []
    for name, rank, shares in (
        ("rank 0", first, [other, peer]),
        ("first of a coordinate", other, [other_peer]),
        ("last", other_peer, []),
    ):
        held = sum(share["token_bytes"] for share in shares)
        rows.append(
            {
                "op": "transport",
                "case": name,
                "seconds": rank["seconds"],
                "bytes_on_the_wire": rank["sent"],
                "bytes_of_tokens_in_shares": held,
            }
        )
        assert held <= rank["sent"] <= 1.02 * held + 4096 * len(shares), "tokens, and a small plan"
    return rows


def ratios(rows: list[Row]) -> dict[str, float]:
    """Return figures per token of the whole batch, prompt and response; see docs/benchmarks.md."""
    found = {}
    for row in rows:
        if row["op"] == "host":
            name = "rank0" if row["case"] == "rank 0" else "other"
            found[f"host_{name}_ns_per_token"] = row["cpu_seconds"] * 1e9 / row["tokens"]
            found[f"host_{name}_bytes_per_token"] = row["peak_extra_bytes"] / row["tokens"]
    return found


def main(arguments: list[str]) -> None:
    """Run all rows and write the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the rows and ratios go")
    parser.add_argument("--quick", action="store_true", help="an eighth of the samples, fewer repetitions")
    options = parser.parse_args(arguments)
    num_prompts = NUM_PROMPTS // 8 if options.quick else NUM_PROMPTS
    store = torch._C._distributed_c10d.HashStore()
    rows = transport_rows(num_prompts // 8)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    rows += host_rows(num_prompts, repeats=3 if options.quick else 7)
    dist.destroy_process_group()
    found = ratios(rows)
    options.json.write_text(json.dumps({"rows": rows, "ratios": found}, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)
    for name, value in found.items():
        print(f"{name:40} {value:.4g}")
