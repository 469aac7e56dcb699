"""``python -m benchmarks grpo --json FILE [--quick]``: a GRPO step against TRL's GRPOTrainer.

`megarl grpo` and TRL train the same model in float32 on the same problems in the same order, with the same
verifier, group size, longest response and optimizer: 8 prompts x 8 samples of up to 64 tokens. One after the
other, each in separate processes on all cores. Two models: SmolLM2-135M-Instruct (`make smollm2`) and the
quickstart's tiny model after SFT, which is trained here if missing. The tiny model's greedy accuracy on
problems that do not occur in training is measured after the last step.

Both sides end a response at the same token, so lengths follow the same distribution, but samples differ:
seconds per response token are reported next to seconds per step. ``ratios`` compare with TRL's defaults
(Transformers generates, 8 samples per microbatch, gradient checkpointing); a full run also has TRL without
checkpointing. Peak memory is that of all processes of a side together (benchmarks/process_tree.py), Ray's and
the engine's included. Times cover every step, not the start of a process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.process_tree import run_measured

Row = dict[str, Any]
PROMPTS, GENERATIONS, MAX_NEW_TOKENS = 8, 8, 64
SMOLLM2, TINY = "models/smollm2-135m-instruct", "runs/bench/tiny/sft/hf"

CASES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model": SMOLLM2,
        "arguments": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        "extract": "last_number",
        "partial_credit": False,
        "chat_template": True,
        "lr": 1e-5,
        # A group of 8 samples with its prompt once; TRL's microbatch is 8 samples.
        "microbatch_tokens": 512,
        # 64 sequences of at most 128 tokens, four blocks each: 46,080 bytes a token.
        "kv_cache_gib": 0.36,
        "steps": 6,
    },
    "tiny": {
        "model": TINY,
        "arguments": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        "extract": "response",
        "partial_credit": False,
        "chat_template": False,
        "lr": 3e-4,
        "microbatch_tokens": 4096,
        "kv_cache_gib": 0.1,
        "steps": 120,
        "held_out": 256,
    },
}
TRL: dict[str, dict[str, Any]] = {
    "trl": {"per_device_train_batch_size": GENERATIONS},
    "trl_without_checkpointing": {
        "per_device_train_batch_size": GENERATIONS,
        "gradient_checkpointing": False,
    },
}
PHASES = ("rollout", "reward", "logprobs", "train", "weights")


def configuration(case: dict[str, Any], steps: int, run_dir: Path) -> dict[str, Any]:
    """Return the run of both sides as a configuration of `megarl grpo`."""
    return {
        "run": {"dir": str(run_dir)},
        "model": {"path": case["model"]},
        "data": {
            "train": {
                "source": "reasoning_gym",
                "task": "chain_sum",
                "arguments": case["arguments"],
                "extract": case["extract"],
                "partial_credit": case["partial_credit"],
                "size": 3000,
            },
            "format": {"chat_template": case["chat_template"]},
            "shuffle": False,
        },
        "rollout": {
            "num_prompts_per_step": PROMPTS,
            "num_generations_per_prompt": GENERATIONS,
            "max_new_tokens": MAX_NEW_TOKENS,
            "engine": {"kv_cache_gib": case["kv_cache_gib"]},
        },
        "weights": {"offload": ["kv_cache"]},
        "training": {"num_steps": steps},
        "optimizer": {"lr": case["lr"]},
        "packing": {"max_tokens_per_microbatch": case["microbatch_tokens"], "max_sequence_length": 256},
        "evaluation": {"at_start": False, "at_end": False},
        "checkpoint": {"interval": 0, "save_optimizer": False, "export_hf": "held_out" in case},
    }


def held_out_accuracy(case: dict[str, Any], model_dir: str, folder: Path) -> float:
    """Return the share of held-out problems, none of them in training, that the model solves greedily.

    Hugging Face generates for both sides, so neither side's engine affects it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megarl.config.grpo import GrpoConfig
    from megarl.config.load import load_config
    from megarl.data.prompts import load_prompts
    from megarl.environments import grade, make

    written = configuration(case, 1, folder / "run")
    written["data"]["held_out"] = {**written["data"]["train"], "size": 600, "seed": 1_000_000}
    file = folder / "held_out.yaml"
    file.write_text(yaml.safe_dump(written))
    config = load_config(GrpoConfig, file, [])
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    held_out = load_prompts(config.data, tokenizer, max_prompt_tokens=10_000, split="held_out")
    unseen = held_out.unseen
    assert unseen is not None
    problems = [held_out[i] for i in unseen[: case["held_out"]]]
    assert len(problems) == case["held_out"], (
        f"only {len(problems)} held-out problems do not occur in training"
    )
    environment = make(config.data.train)
    solved = 0.0
    for start in range(0, len(problems), 64):
        some = problems[start : start + 64]
        padded = tokenizer.pad({"input_ids": [p.token_ids.tolist() for p in some]}, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**padded, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers = out[:, padded["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        solved += sum(asyncio.run(grade(environment, p, t))[0] for p, t in zip(some, texts, strict=True))
    return solved / len(problems)


def make_tiny_model() -> None:
    """Make the quickstart's model and its SFT checkpoint, if missing."""
    model, run = "runs/bench/tiny/model", "runs/bench/tiny/sft"
    commands = []
    if not Path(model, "config.json").exists():
        commands.append(["tools/make_tiny_model.py", "--output", model, "--seed", "1"])
    if not Path(TINY, "config.json").exists():
        paths = [f"run.dir={run}", f"model.path={model}"]
        commands.append(["-m", "megarl.cli", "sft", "--config", "configs/quickstart_sft.yaml", *paths])
    for command in commands:
        print(f"preparing the tiny model: python {' '.join(command)}", file=sys.stderr)
        subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)


def measure(name: str, side: str, steps: int, seed: int, folder: Path) -> Row:
    """Run one side once; return its row."""
    config = configuration(CASES[name], steps, folder / "run")
    config["run"]["seed"] = seed
    config_file, result_file = folder / "config.yaml", folder / "steps.json"
    config_file.write_text(yaml.safe_dump(config))
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if side == "megarl":
        command = ["-m", "megarl.cli", "grpo", "--config", str(config_file)]
    else:
        job_file = folder / "job.json"
        save_to = str(folder / "run" / "hf") if "held_out" in CASES[name] else None
        job_file.write_text(
            json.dumps({"config": str(config_file), "options": TRL[side], "save_to": save_to})
        )
        command = ["-m", "benchmarks.grpo_trainers", str(job_file), str(result_file)]
        environment["HF_DATASETS_CACHE"] = str(folder / "datasets")
    peak = run_measured([sys.executable, *command], environment, folder / "log.txt")
    if side == "megarl":
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        prompts = prompt_tokens(config_file)
        done = [_our_step(json.loads(line), prompts) for line in lines]
    else:
        done = json.loads(result_file.read_text())
    assert len(done) == steps, f"{len(done)} of {steps} steps in {folder}"
    row = {
        "op": "grpo",
        "case": name,
        "impl": side,
        "seed": seed,
        "peak_gib": peak.gib,
        "peak_processes": peak.processes,
    }
    row |= {**summary(done), "steps": done}
    if "held_out" in CASES[name]:
        row["accuracy_after"] = held_out_accuracy(CASES[name], str(folder / "run" / "hf"), folder)
    phases = " ".join(f"{phase} {row[f'seconds_{phase}']:.2f}" for phase in PHASES)
    print(
        f"{name:13} {side:26} {row['seconds_per_step']:7.2f} s/step ({phases}) "
        f"{row['tokens_per_second']:7.1f} tok/s, {row['response_length_mean']:.1f} tokens per response, "
        f"reward {row['reward_first']:.3f} -> {row['reward_last']:.3f}, {peak.gib:.2f} GiB",
        file=sys.stderr,
    )
    return row


def _our_step(line: dict[str, float], prompts: list[int]) -> dict[str, float]:
    kept = {name: value for name, value in line.items() if name.startswith("seconds")}
    responses = round(line["response_length_mean"] * PROMPTS * GENERATIONS)
    first = PROMPTS * (int(line["step"]) - 1)
    return kept | {
        "reward_mean": line["reward_mean"],
        "num_response_tokens": responses,
        # Of all samples, like TRL's: the run's num_tokens counts only computed samples.
        "num_tokens": responses + GENERATIONS * sum(prompts[first : first + PROMPTS]),
        "skipped_zero_advantage": line["skipped_zero_advantage"],
    }


def prompt_tokens(config_file: Path) -> list[int]:
    """Return the prompt length of each problem, in tokens, in order."""
    from transformers import AutoTokenizer

    from megarl.config.grpo import GrpoConfig
    from megarl.config.load import load_config
    from megarl.data.prompts import load_prompts

    config = load_config(GrpoConfig, config_file, [])
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    dataset = load_prompts(config.data, tokenizer, max_prompt_tokens=10_000, split="train")
    count = config.training.num_steps * PROMPTS
    return [len(dataset[i].token_ids) for i in range(count)]


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return means over all steps, and the reward of the first and last third of them."""

    def total(name: str) -> float:
        return sum(step.get(name, 0.0) for step in steps)

    third = max(1, len(steps) // 3)
    rewards = [step["reward_mean"] for step in steps]
    return {
        "seconds_per_step": total("seconds") / len(steps),
        **{f"seconds_{phase}": total(f"seconds_{phase}") / len(steps) for phase in PHASES},
        "tokens_per_second": total("num_tokens") / total("seconds"),
        "response_tokens_per_second": total("num_response_tokens") / total("seconds"),
        "response_length_mean": total("num_response_tokens") / len(steps) / (PROMPTS * GENERATIONS),
        "reward_first": statistics.mean(rewards[:third]),
        "reward_last": statistics.mean(rewards[-third:]),
        "reward_mean": statistics.mean(rewards),
    }


def ratios(rows: list[Row]) -> dict[str, float]:
    """Return TRL's seconds over ours (per step, per response token), our peak memory over TRL's, and rewards.

    Means over seeds if a side has several.
    """
    by_case: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {}).setdefault(row["impl"], []).append(row)
    out: dict[str, float] = {}
    for case, sides in by_case.items():
        prefix = "" if case == "smollm2-135m" else f"{case}_"
        means = {
            side: {
                name: statistics.mean(row[name] for row in found)
                for name in ("seconds_per_step", "response_tokens_per_second", "peak_gib", "reward_mean")
            }
            for side, found in sides.items()
        }
        ours = means.pop("megarl", None)
        for peer, theirs in means.items() if ours is not None else ():
            speed = "response_tokens_per_second"
            out[f"{prefix}step_vs_{peer}"] = theirs["seconds_per_step"] / ours["seconds_per_step"]
            out[f"{prefix}response_token_vs_{peer}"] = ours[speed] / theirs[speed]
            out[f"{prefix}peak_memory_vs_{peer}"] = ours["peak_gib"] / theirs["peak_gib"]
            out[f"{prefix}reward_minus_{peer}"] = ours["reward_mean"] - theirs["reward_mean"]
    return out


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks grpo")
    parser.add_argument("--json", type=lambda text: Path(text).resolve(), required=True, help="the results")
    parser.add_argument("--quick", action="store_true", help="2 steps each, TRL as it comes only")
    parser.add_argument("--case", choices=list(CASES), help="one model only")
    parser.add_argument("--side", choices=["megarl", *TRL], help="one side only")
    parser.add_argument("--steps", type=int, help="steps of each run")
    parser.add_argument("--seed", type=int, default=1, help="of the samples, on both sides")
    parser.add_argument("--append", action="store_true", help="add to the rows of FILE")
    args = parser.parse_args(argv)
    os.chdir(Path(__file__).resolve().parent.parent)
    names = [args.case] if args.case else list(CASES)
    if SMOLLM2 in [CASES[name]["model"] for name in names] and not Path(SMOLLM2).exists():
        sys.exit(f"{SMOLLM2} is missing: make smollm2")
    sides = [args.side] if args.side else ["megarl", "trl"] if args.quick else ["megarl", *TRL]
    if "tiny" in names:
        make_tiny_model()
    rows = json.loads(args.json.read_text())["rows"] if args.append and args.json.exists() else []
    for name in names:
        steps = args.steps or (2 if args.quick else CASES[name]["steps"])
        for side in sides:
            with tempfile.TemporaryDirectory(prefix="megarl-bench-") as directory:
                rows.append(measure(name, side, steps, args.seed, Path(directory)))
    result = {"rows": rows, "ratios": ratios(rows), "num_threads": len(os.sched_getaffinity(0))}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["ratios"], indent=2))
