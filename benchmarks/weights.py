"""Weight sync: MegaRL's against gathering full tensors, and against plain memcpy.

The engine is a real vLLM engine in this process; trainer ranks are separate processes with a real Megatron
model (benchmarks/weights_trainer.py). The measured time is what a training step waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Implementation, Row, peak_extra_bytes
from benchmarks.weights_trainer import BUCKET_BYTES
from megarl.layout import ParallelLayout
from megarl.models import load_architecture
from megarl.weights.plan import Planner, Reader

_DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _DENSE,
    # Nine heads do not divide by two: the same sizes with 8 heads on 4 kv heads of 64.
    "smollm2-135m-8-heads": _DENSE | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
    "qwen3-moe-50m": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 384,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 16384,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    },
}


@dataclass(frozen=True)
class Case:
    """One trainer layout with an engine of one rank."""

    model: str
    name: str
    ranks: int
    layout: dict[str, Any]


CASES = [
    Case("smollm2-135m", "tp1", 1, {}),
    Case("smollm2-135m", "pp2", 2, {"pipeline_parallel_size": 2}),
    Case("smollm2-135m-8-heads", "tp2", 2, {"tensor_parallel_size": 2}),
    Case("qwen3-moe-50m", "tp1", 1, {}),
    Case("qwen3-moe-50m", "ep2", 2, {"expert_parallel_size": 2}),
]


class Trainer:
    """The ranks of a case, with a connection to each."""

    def __init__(self, case: Case, model_dir: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._connections: dict[int, Connection] = {}
        self._bucket = torch.empty(0)
        with Listener() as listener:
            command = [sys.executable, "-m", "benchmarks.weights_trainer"]
            command += [str(listener.address), str(model_dir), json.dumps(case.layout)]
            command += [str(port), str(case.ranks)]
            self._processes = [
                subprocess.Popen([*command, str(rank)], stdout=subprocess.DEVNULL)
                for rank in range(case.ranks)
            ]
            threading.Thread(target=self._watch, args=(listener.address,), daemon=True).start()
            for _ in self._processes:
                connection = listener.accept()
                rank = connection.recv()
                if rank is None:
                    raise RuntimeError("a trainer rank of the benchmark died at its start")
                self._connections[rank] = connection

    def _watch(self, address: Any) -> None:
        """Connect in place of a rank that dies before it connects, so the listener does not wait forever."""
        while len(self._connections) < len(self._processes):
            if any(process.poll() is not None for process in self._processes):
                with Client(address) as connection:
                    connection.send(None)
                return
            time.sleep(0.2)

    def ask(self, command: str, load: Callable[[list[tuple[str, torch.Tensor]]], None]) -> list[Any]:
        """Return every rank's answer; pass buckets that arrive meanwhile to ``load``."""
        for connection in self._connections.values():
            connection.send(command)
        answers: list[Any] = []
        for rank in sorted(self._connections):
            connection = self._connections[rank]
            while True:
                kind, value = connection.recv()
                if kind == "answer":
                    answers.append(value)
                    break
                if kind == "bucket":
                    storage = torch.UntypedStorage._new_shared_filename_cpu(*value)
                    self._bucket = torch.empty(0).set_(storage)
                else:
                    flat = self._bucket
                    load(
                        [
                            (name, flat[start : start + torch.Size(shape).numel()].view(shape))
                            for name, start, shape in value
                        ]
                    )
                connection.send("done")
        return answers

    def stop(self) -> None:
        """End the ranks."""
        for connection in self._connections.values():
            connection.send("stop")
        for process in self._processes:
            process.wait(60)


def write_model(directory: Path, config: dict[str, Any]) -> None:
    """Write a Hugging Face directory with random weights."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    shapes = load_architecture(directory).hf_shapes()
    save_file(
        {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )


def start_engine(model_dir: Path) -> Any:
    """Start vLLM in this process, configured like a run's engine."""
    from megarl.cluster.variables import engine_variables
    from megarl.config.rollout import EngineConfig
    from megarl.inference.actor.settings import EngineSettings
    from megarl.inference.vllm.build import build_engine

    os.environ.update(engine_variables(torch.get_num_threads()))
    config = EngineConfig(kv_cache_gib=0.05, max_num_seqs=4)
    return build_engine(EngineSettings(str(model_dir), config, "float32", 256, 1, tempfile.gettempdir()))


def run_case(case: Case, engine: Any, model_dir: Path, repeats: int) -> list[Row]:
    """Return a case's rows: MegaRL's sync, gather-all, and a memcpy of the bytes MegaRL writes (or all)."""
    model = engine.model_executor.driver_worker.worker.model_runner.model
    params = dict(model.named_parameters())
    for param in params.values():  # separate memory again, after an earlier case
        param.data = param.detach().clone()
    model_bytes = sum(param.nbytes for param in params.values())
    trainer = Trainer(case, model_dir)
    owners = trainer.ask("offer", lambda _: None)[0]
    layout = ParallelLayout()
    regions = load_architecture(model_dir).engine_regions(layout, layout.coordinates(0))
    params_of_engine = engine.collective_rpc("megarl_describe")[0]
    host, device = engine.collective_rpc("megarl_place")[0]
    plan = Planner(owners).plan(Reader(regions, params_of_engine, host, device))

    private = {name: param.detach().clone() for name, param in params.items()}

    def load(tensors: list[tuple[str, torch.Tensor]]) -> None:
        with torch.inference_mode():
            model.load_weights(iter(tensors))

    def gather() -> None:
        trainer.ask("gather", load)

    gather_seconds = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        gather()
        if repeat:
            gather_seconds.append(time.perf_counter() - start)
    gather_peak = sum(trainer.ask("gather_peak", load))

    for name, param in params.items():
        param.data = private[name]
    engine.collective_rpc("megarl_attach", args=([plan],))

    def sync() -> int:
        moved = sum(engine.collective_rpc("megarl_copy"))
        engine.reset_prefix_cache(reset_running_requests=True)
        return int(moved)

    moved = sync()
    copied = moved or model_bytes
    source, target = torch.ones(copied // 4), torch.zeros(copied // 4)
    sync_seconds, memcpy_seconds = [], []
    for _ in range(repeats * 3):
        start = time.perf_counter()
        sync()
        sync_seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        target.copy_(source)
        memcpy_seconds.append(time.perf_counter() - start)
    sync_peak = peak_extra_bytes(Implementation("sync", sync))
    trainer.stop()
    rows = [
        ("megarl", sync_seconds, moved, sync_peak),
        ("gather_all", gather_seconds, model_bytes, gather_peak),
        ("memcpy", memcpy_seconds, copied, 0),
    ]
    return [
        {
            "op": "weights",
            "case": f"{case.model} {case.name} -> tp1",
            "impl": impl,
            "pass": "sync",
            "seconds": statistics.median(seconds),
            "bytes_moved": moved_bytes,
            "peak_extra_bytes": peak,
            "model_bytes": model_bytes,
        }
        for impl, seconds, moved_bytes, peak in rows
    ]


def ratios(rows: list[Row]) -> dict[str, float]:
    """Return the headline figures: the worst of the cases of each."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["impl"]] = row
    out: dict[str, float] = {}
    alias = by_case["smollm2-135m tp1 -> tp1"]
    out["alias_bytes"] = alias["megarl"]["bytes_moved"]
    out["alias_seconds"] = alias["megarl"]["seconds"]
    out["alias_vs_gather"] = alias["gather_all"]["seconds"] / alias["megarl"]["seconds"]
    for case, impls in by_case.items():
        ours, gather, memcpy = impls["megarl"], impls["gather_all"], impls["memcpy"]
        out[f"vs_gather: {case}"] = gather["seconds"] / ours["seconds"]
        if ours["bytes_moved"]:
            out[f"vs_memcpy: {case}"] = memcpy["seconds"] / ours["seconds"]
        out[f"peak_extra_vs_model: {case}"] = ours["peak_extra_bytes"] / ours["model_bytes"]
    resharded = [case for case in by_case if "tp1 -> tp1" not in case]
    out["reshard_vs_gather"] = min(out[f"vs_gather: {case}"] for case in resharded)
    out["reshard_vs_memcpy"] = min(
        out[f"vs_memcpy: {case}"] for case in resharded if f"vs_memcpy: {case}" in out
    )
    out["reshard_peak_extra_vs_model"] = max(out[f"peak_extra_vs_model: {case}"] for case in resharded)
    return out


def run_model(name: str, repeats: int) -> list[Row]:
    """Run all cases of one model, with one engine."""
    with tempfile.TemporaryDirectory(prefix="megarl-bench-") as directory:
        model_dir = Path(directory) / name
        write_model(model_dir, MODELS[name])
        engine = start_engine(model_dir)
        rows = []
        for case in CASES:
            if case.model == name:
                rows += run_case(case, engine, model_dir, repeats)
        return rows


def main(argv: list[str]) -> None:
    """``python -m benchmarks weights --json FILE [--quick]``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks weights")
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under 4 minutes")
    parser.add_argument("--model", choices=list(MODELS), help="the cases of one model only (no ratios)")
    args = parser.parse_args(argv)
    repeats = 3 if args.quick else 10
    args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.model:
        args.json.write_text(json.dumps({"rows": run_model(args.model, repeats)}))
        return
    rows: list[Row] = []
    for name in MODELS:  # vLLM holds one engine per process
        part = args.json.with_suffix(f".{name}.part")
        command = [sys.executable, "-m", "benchmarks", "weights", "--model", name, "--json", str(part)]
        subprocess.run(command + ["--quick"] * args.quick, check=True, stdout=sys.stderr)
        rows += json.loads(part.read_text())["rows"]
        part.unlink()
    for row in rows:
        print(
            f"{row['case']:38} {row['impl']:10} {row['seconds'] * 1e3:9.2f} ms "
            f"{row['bytes_moved'] / 2**20:8.1f} MiB moved, {row['peak_extra_bytes'] / 2**20:8.2f} MiB extra",
            file=sys.stderr,
        )
    result = {"rows": rows, "ratios": ratios(rows), "gather_bucket_bytes": BUCKET_BYTES}
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["ratios"], indent=2))
