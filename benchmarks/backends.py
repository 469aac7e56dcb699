"""Compare backends of trainer and engine: ``python -m benchmarks backends --json FILE [--quick]``.

SFT: the torch backend, the Megatron backend, and TRL with packed and padded rows, on the batches and with the
settings of benchmarks/train.py.

Generation: SmolLM2-135M's sizes with random weights in float32, 64 concurrent requests, responses of
log-normal lengths, sampled at temperature 1, with all cores. ``generate`` is transformers' own, one batch of
64 after another, each until its longest response ends; the engines take all requests at once and fill slots
as they become free. All engines run side by side and wait while another works. Weights are synced once,
untimed; a warm-up comes first.

The sides take turns, round after round; a ratio is the median of the rounds'. CPU seconds are those of all
threads, and on a machine shared with other work their ratios are the better ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch

from benchmarks.common import Row
from benchmarks.train import BATCH, make_sequences, measure_row
from benchmarks.weights import MODELS, write_model
from megarl.cluster.variables import cores
from megarl.config.rollout import EngineConfig
from megarl.inference.interface import GenerateRequest, SamplingConfig
from megarl.records import token_ids

SLOTS = 64
REQUESTS = 128
"""Of a round: two batches of ``generate``."""
ENGINES = ["generate", "hf", "vllm"]
TRAINERS = {
    "torch": "megarl_torch",
    "megatron": "megarl",
    "trl_packed": "trl_packed",
    "trl_padded": "trl_padded",
}
"""Sides of SFT, and their names in benchmarks/train_trainers.py."""
MAX_MODEL_LEN = 1024
RATIOS = [
    ("torch_vs_megatron_speed", "sft", "torch", "megatron"),
    ("torch_vs_trl_packed", "sft", "torch", "trl_packed"),
    ("torch_vs_trl_padded", "sft", "torch", "trl_padded"),
    ("hf_engine_vs_generate", "generation", "hf", "generate"),
    ("hf_engine_vs_vllm", "generation", "hf", "vllm"),
]
"""Name, case, and the two sides compared."""
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "pad_token_id": 2,
    "eos_token_id": 0,
}
Generate = Callable[[list[GenerateRequest]], int]
"""Sample all requests; return the number of tokens drawn."""


def make_requests(count: int, median: float, longest: int) -> list[GenerateRequest]:
    """Return prompts of 32 to 96 tokens with log-normal response lengths (sigma 0.9), cut at ``longest``."""
    generator = np.random.default_rng(1)
    lengths = np.clip(generator.lognormal(np.log(median), 0.9, count), 4, longest).astype(int)
    prompts = [token_ids(generator.integers(3, 49152, generator.integers(32, 97))) for _ in lengths]
    return [GenerateRequest(f"r{i}", prompts[i], int(n), seed=i) for i, n in enumerate(lengths)]


def plain_generate(model: Any) -> Generate:
    """Wrap ``model.generate`` on left-padded batches."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Lengths(StoppingCriteria):  # type: ignore[misc]
        """Stop each row at its own length."""

        def __init__(self, limits: torch.Tensor) -> None:
            self.limits = limits

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] >= self.limits

    def run(requests: list[GenerateRequest]) -> int:
        for start in range(0, len(requests), SLOTS):
            batch = requests[start : start + SLOTS]
            width = max(len(request.prompt_ids) for request in batch)
            ids = torch.full((len(batch), width), SMOLLM2["pad_token_id"])
            mask = torch.zeros_like(ids)
            for row, request in enumerate(batch):
                ids[row, width - len(request.prompt_ids) :] = torch.from_numpy(request.prompt_ids).long()
                mask[row, width - len(request.prompt_ids) :] = 1
            limits = torch.tensor([width + request.max_new_tokens for request in batch])
            model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                eos_token_id=None,
                max_new_tokens=max(request.max_new_tokens for request in batch),
                stopping_criteria=StoppingCriteriaList([Lengths(limits)]),
            )
        return sum(request.max_new_tokens for request in requests)

    return run


def through(engine: Any) -> Generate:
    """Wrap an engine, used as by episodes."""
    import asyncio

    from megarl.inference.client import SessionClient

    sampling = SamplingConfig(1.0, (), True)

    async def sample(requests: list[GenerateRequest]) -> int:
        client = SessionClient(engine, sampling)
        responses = await asyncio.gather(*(client.generate(request) for request in requests))
        client.close()
        return sum(len(response.token_ids) for response in responses)

    return lambda requests: asyncio.run(sample(requests))


def start_engine(backend: Literal["vllm", "hf"], model: Any, directory: Path) -> Any:
    """Start an engine with the model's weights."""
    from megarl.inference.engine_group import start_engines
    from megarl.inference.placement import BESIDE_DRIVER
    from megarl.loops.engine_setup import attach_weights
    from megarl.models import load_architecture
    from megarl.models.table import Region
    from megarl.weights.shared_storage import share_parameters

    config = EngineConfig(backend=backend, kv_cache_gib=1.5, max_num_seqs=SLOTS)
    options = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, "seed": 1, "log_dir": directory / backend}
    engine = start_engines(directory, config, [BESIDE_DRIVER], **options)
    params = dict(model.named_parameters())
    boxes = {name: tuple((0, size) for size in param.shape) for name, param in params.items()}
    owner = share_parameters(params, [Region(name, box, name, box) for name, box in boxes.items()])
    attach_weights(engine, load_architecture(directory), [owner])
    engine.sync(0)
    return engine


def cpu_seconds(engine: Any) -> float:
    """Return CPU seconds of this process and the engine's, all threads, without other processes."""
    processes = [psutil.Process(), *([psutil.Process(engine.health().pid)] if engine is not None else [])]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def measure_generation(sides: list[str], rounds: int, median: float, longest: int) -> list[Row]:
    """Return a row per side and round: tokens per second over the round's requests."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).eval().requires_grad_(False)
    requests = make_requests(rounds * REQUESTS, median, longest)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="megarl-bench-") as name:
        directory = Path(name)
        model.save_pretrained(directory)
        engines: dict[str, Any] = {
            side: start_engine(side, model, directory)  # type: ignore[arg-type]
            for side in sides
            if side != "generate"
        }
        runs = {side: through(engines[side]) if side in engines else plain_generate(model) for side in sides}
        for run in runs.values():
            run([GenerateRequest(f"w{i}", r.prompt_ids, 4, i) for i, r in enumerate(requests[:8])])
        for number in range(rounds):
            part = requests[number * REQUESTS : (number + 1) * REQUESTS]
            rows += [_generation_row(side, run, engines.get(side), part) for side, run in runs.items()]
        for engine in engines.values():
            engine.shutdown()
    return rows


def _generation_row(side: str, run: Generate, engine: Any, requests: list[GenerateRequest]) -> Row:
    start, worked = time.perf_counter(), cpu_seconds(engine)
    tokens = run(requests)
    seconds, worked = time.perf_counter() - start, cpu_seconds(engine) - worked
    assert tokens == sum(request.max_new_tokens for request in requests)
    print(f"generation {side:9} {tokens / seconds:8.1f} tokens/s, {worked:6.1f} s of CPU", file=sys.stderr)
    return {
        "case": "generation",
        "impl": side,
        "requests": len(requests),
        "tokens": tokens,
        "longest": max(request.max_new_tokens for request in requests),
        "seconds": seconds,
        "cpu_seconds": worked,
        "tokens_per_second": tokens / seconds,
    }


def measure_training(trainers: list[str], rounds: int, steps: int) -> list[Row]:
    """Return a row per trainer and round; see benchmarks/train.py."""
    with tempfile.TemporaryDirectory(prefix="megarl-bench-") as name:
        folder = Path(name)
        write_model(folder / "smollm2-135m", MODELS["smollm2-135m"])
        job = {"sequences": make_sequences(steps * BATCH), "batch_size": BATCH, "threads": cores()}
        rows: list[Row] = []
        for _ in range(rounds):
            for side in trainers:
                rows.append(measure_row(TRAINERS[side], job, folder) | {"case": "sft", "impl": side})
        return rows


def ratios(rows: list[Row]) -> dict[str, float]:
    """Return medians over rounds: tokens per second, per CPU second (``_cpu``), and peak memory."""
    found: dict[str, float] = {}

    def add(name: str, case: str, one: str, other: str, value: Callable[[Row], float]) -> None:
        of = [[value(row) for row in rows if (row["case"], row["impl"]) == (case, i)] for i in (one, other)]
        if pairs := list(zip(*of, strict=False)):
            found[name] = statistics.median(a / b for a, b in pairs)

    for name, case, one, other in RATIOS:
        add(name, case, one, other, lambda row: row["tokens_per_second"])
        add(f"{name}_cpu", case, one, other, lambda row: row["tokens"] / row["cpu_seconds"])
    add("torch_vs_megatron_memory", "sft", "torch", "megatron", lambda row: row["peak_gib"])
    return found


def main(argv: list[str]) -> None:
    """Measure and write ``{rows, ratios}``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks backends")
    parser.add_argument("--json", type=Path, required=True, help="the results")
    parser.add_argument("--quick", action="store_true", help="one round: under 8 minutes")
    parser.add_argument("--side", action="append", choices=[*TRAINERS, *ENGINES], help="some of them only")
    parser.add_argument("--rounds", type=int, help="other than 1 (--quick) or 3")
    args = parser.parse_args(argv)
    from megarl.cluster.ray_runtime import stop_ray

    sides = args.side or [*TRAINERS, *ENGINES]
    rounds = args.rounds or (1 if args.quick else 3)
    trainers = [side for side in sides if side in TRAINERS]
    engines = [side for side in sides if side in ENGINES]
    rows = measure_training(trainers, rounds, 2 if args.quick else 3)
    if engines:
        rows += measure_generation(engines, rounds, *((16, 96) if args.quick else (64, 512)))
        stop_ray()
    result = {"rows": rows, "ratios": ratios(rows), "num_threads": cores()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["ratios"], indent=2))
