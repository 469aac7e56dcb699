"""Every rule about combinations: the exact line when it is broken, silence just inside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.config.evaluate import EvalConfig
from megarl.config.grpo import GrpoConfig
from megarl.config.load import dump_config, load_config
from megarl.config.ppo import PpoConfig
from megarl.config.section import Section
from megarl.config.sft import SftConfig
from megarl.errors import UserError

GYM = {"source": "reasoning_gym", "task": "chain_sum", "size": 100}
BASE: dict[str, Any] = {"run": {"dir": "r"}, "model": {"path": "m"}}
DATA = {"train": {**GYM, "seed": 0}, "held_out": {**GYM, "seed": 100}}
GRPO = {
    **BASE,
    "optimizer": {"lr": 1e-3},
    "data": DATA,
    "rollout": {"num_prompts_per_step": 8, "num_generations_per_prompt": 4, "max_new_tokens": 16},
    "evaluation": {"num_prompts": 100},
    "training": {"num_steps": 10},
}
SFT = {**BASE, "optimizer": {"lr": 1e-3}, "data": DATA, "training": {"num_steps": 10, "batch_size": 8}}
SFT["training"] |= {"validation_size": 100}
EVAL = {
    **BASE,
    "data": {"held_out": DATA["held_out"]},
    "rollout": {"max_new_tokens": 16},
    "evaluation": {"num_prompts": 100},
}
ROOTS: dict[type[Section], dict[str, Any]] = {GrpoConfig: GRPO, SftConfig: SFT, EvalConfig: EVAL}


def lines(tmp_path: Path, kind: type[Section], overrides: list[str]) -> list[str]:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(ROOTS[kind]))
    try:
        load_config(kind, file, overrides, check_files=False)
    except UserError as error:
        return [line.split(" [")[0] for line in str(error).splitlines()]
    return []


@pytest.mark.parametrize("kind", ROOTS)
def test_the_bases_are_valid(tmp_path: Path, kind: type[Section]) -> None:
    assert lines(tmp_path, kind, []) == []


BROKEN: list[tuple[type[Section], list[str], str]] = [
    (
        SftConfig,
        ["parallel.context_attention=ring", "packing.share_prefix=off"],
        "parallel.context_attention: ring needs parallel.context_parallel_size > 1 (got "
        "context_parallel_size 1)",
    ),
    (
        SftConfig,
        ["parallel.context_attention=ring", "parallel.context_parallel_size=2", "parallel.num_processes=2"],
        "parallel.context_attention: ring has no shared prefixes: set packing.share_prefix: off, or use "
        "all_gather",
    ),
    (
        SftConfig,
        ["parallel.context_split_from=64"],
        "parallel.context_split_from: needs parallel.context_parallel_size > 1 (got context_parallel_size 1)",
    ),
    (
        SftConfig,
        [f"parallel.{n}=2" for n in ("context_parallel_size", "num_processes")]
        + ["parallel.context_split_from=66", "packing.max_tokens_per_microbatch=128"],
        "parallel.context_split_from: shorter sequences must fit into one rank's share of a microbatch, "
        "packing.max_tokens_per_microbatch / context_parallel_size: at most 65 (got 66)",
    ),
    (
        SftConfig,
        ["parallel.sequence_parallel=true"],
        "parallel.sequence_parallel: needs parallel.tensor_parallel_size > 1 (got tensor_parallel_size 1)",
    ),
    (
        SftConfig,
        [f"parallel.{n}_parallel_size=2" for n in ("tensor", "pipeline", "context")]
        + ["parallel.num_processes=12"],
        "parallel.num_processes: must be a multiple of tensor_parallel_size * pipeline_parallel_size * "
        "context_parallel_size = 8 (got 12)",
    ),
    (
        SftConfig,
        ["optimizer.min_lr=0.01"],
        "optimizer.min_lr: must not exceed optimizer.lr = 0.001 (got 0.01)",
    ),
    (
        GrpoConfig,
        ["rollout.engine.expert_parallel=true"],
        "rollout.engine.expert_parallel: needs rollout.engine.tensor_parallel_size > 1, the ranks that "
        "split the experts (got true)",
    ),
    (
        SftConfig,
        ["packing.max_sequence_length=4097"],
        "packing.max_sequence_length: a sequence of this length must fit into a microbatch, "
        "packing.max_tokens_per_microbatch = 4096 (got 4097)",
    ),
    (
        EvalConfig,
        ["data.format.chat_template=false", "data.format.system_prompt=Be brief."],
        "data.format.system_prompt: needs a chat template, but data.format.chat_template is false",
    ),
    (
        GrpoConfig,
        ["data.held_out.seed=90"],
        "data.held_out.seed: 10 problems would be in both data.train and data.held_out: problem i depends on "
        "seed + i only; use a seed >= 100 (got 90)",
    ),
    (
        SftConfig,
        ["data.train.seed=150"],
        "data.held_out.seed: 50 problems would be in both data.train and data.held_out: problem i depends on "
        "seed + i only; use a seed >= 250 (got 100)",
    ),
    (
        SftConfig,
        ["data.train={source: jsonl, path: a}", "data.held_out={source: jsonl, path: a}"],
        "data.held_out.path: is the same file as data.train.path (got 'a')",
    ),
    (
        SftConfig,
        ["training.batch_size=101"],
        "training.batch_size: larger than the training set, data.train.size = 100 (got 101)",
    ),
    (
        SftConfig,
        ["training.validation_interval=5", "data.held_out=null"],
        "training.validation_interval: needs data.held_out, which is not set: set it, or this one to 0 "
        "(got 5)",
    ),
    (
        SftConfig,
        ["training.validation_size=101"],
        "training.validation_size: larger than the held-out set, data.held_out.size = 100 (got 101)",
    ),
    (
        SftConfig,
        ["training.batch_size=3", "parallel.num_processes=4"],
        "training.batch_size: an optimizer step of 3 sequences leaves some of 4 data-parallel ranks empty",
    ),
    (
        GrpoConfig,
        [
            "rollout.num_prompts_per_step=2",
            "rollout.num_generations_per_prompt=2",
            "parallel.num_processes=5",
        ],
        "rollout.num_prompts_per_step: an optimizer step of 4 sequences leaves some of 5 data-parallel ranks "
        "empty",
    ),
    (
        GrpoConfig,
        ["rollout.num_generations_per_prompt=1"],
        "rollout.num_generations_per_prompt: a group needs at least 2 samples: with one, "
        "the baseline is the sample itself and the advantage 0 (got 1)",
    ),
    (
        GrpoConfig,
        ["algorithm.clip_low=1"],
        "algorithm.clip_low: must be below 1: ratios are positive, so a bound 1 - clip_low "
        "<= 0 never clips "
        "(got 1.0)",
    ),
    (
        GrpoConfig,
        ["algorithm.clip_low=1.5", "algorithm.objective=cispo", "algorithm.num_epochs_per_batch=2"],
        "algorithm.clip_low: must be below 1: ratios are positive, so a bound 1 - clip_low <= 0 "
        "never clips "
        "(got 1.5)",
    ),
    (
        GrpoConfig,
        ["algorithm.dual_clip=3", "algorithm.objective=cispo", "algorithm.num_epochs_per_batch=2"],
        "algorithm.dual_clip: applies to algorithm.objective = clip only, not to cispo (got 3.0)",
    ),
    (
        GrpoConfig,
        ["algorithm.off_policy_high=2"],
        "algorithm.off_policy_high: algorithm.off_policy_correction = none does not read it (got 2.0)",
    ),
    (
        GrpoConfig,
        ["algorithm.off_policy_low=0.5"],
        "algorithm.off_policy_low: algorithm.off_policy_correction = none does not read it (got 0.5)",
    ),
    (
        GrpoConfig,
        ["algorithm.off_policy_correction=sequence_mask", "algorithm.off_policy_low=0.5"],
        "algorithm.off_policy_high: missing, algorithm.off_policy_correction = sequence_mask needs it",
    ),
    (
        GrpoConfig,
        [
            "algorithm.off_policy_correction=icepop",
            "algorithm.off_policy_low=1.1",
            "algorithm.off_policy_high=2",
        ],
        "algorithm.off_policy_low: off_policy_low < 1 < off_policy_high must hold, or tokens "
        "with a ratio of 1 are masked (got 1.1 and 2.0)",
    ),
    (
        GrpoConfig,
        ["algorithm.off_policy_correction=tis", "algorithm.off_policy_high=0.9"],
        "algorithm.off_policy_high: must be at least 1, or tokens with a ratio of 1 are truncated (got 0.9)",
    ),
    (
        GrpoConfig,
        ["algorithm.kl_gradient=score"],
        "algorithm.kl_gradient: has no effect: algorithm.kl_coef is 0 (got score)",
    ),
    (
        GrpoConfig,
        ["algorithm.kl_estimator=k2"],
        "algorithm.kl_estimator: has no effect: algorithm.kl_coef is 0 (got k2)",
    ),
    (
        GrpoConfig,
        ["algorithm.kl_coef=0.1", "algorithm.kl_estimator=k1"],
        "algorithm.kl_gradient: the plain gradient of k1 does not depend on the reference and averages to "
        "zero: it does not regularise; use another, or kl_estimator k2 or k3 (got plain)",
    ),
    (
        GrpoConfig,
        ["rollout.top_p=0.9", "algorithm.num_epochs_per_batch=2"],
        "rollout.top_p: logprobs are normalised over the sampling policy's support, which is known "
        "only until the weights change: needs one optimizer step per rollout batch, not 2 (got 0.9)",
    ),
    (
        GrpoConfig,
        ["rollout.top_k=20", "algorithm.kl_coef=0.1"],
        "rollout.top_k: the reference does not know the sampling policy's support, so its logprobs "
        "are not comparable: needs algorithm.kl_coef = 0, not 0.1 (got 20)",
    ),
    (
        GrpoConfig,
        ["algorithm.num_optimizer_steps_per_batch=3"],
        "rollout.num_prompts_per_step: must be a multiple of "
        "algorithm.num_optimizer_steps_per_batch = 3 (got 8)",
    ),
    (
        GrpoConfig,
        ["rollout.num_prompts_per_step=101"],
        "rollout.num_prompts_per_step: more than the training set has, data.train.size = 100 (got 101)",
    ),
    (
        GrpoConfig,
        ["rollout.max_new_tokens=512", "packing.max_sequence_length=512"],
        "rollout.max_new_tokens: leaves no room for a prompt within packing.max_sequence_length "
        "= 512 (got 512)",
    ),
    (
        GrpoConfig,
        ["evaluation.max_new_tokens=4096"],
        "evaluation.max_new_tokens: leaves no room for a prompt within "
        "packing.max_tokens_per_microbatch = 4096 "
        "(got 4096)",
    ),
    (
        EvalConfig,
        ["rollout.engine.max_num_batched_tokens=100"],
        "rollout.engine.max_num_batched_tokens: must be at least rollout.engine.max_num_seqs = "
        "256, one token per "
        "sequence (got 100)",
    ),
    (
        GrpoConfig,
        ["data.held_out=null", "evaluation.interval=5", "evaluation.at_end=false"],
        "data.held_out: missing, but required by evaluation.interval: set it, or evaluation.interval=0",
    ),
    (
        GrpoConfig,
        ["data.held_out=null", "evaluation.at_start=true", "evaluation.at_end=true"],
        "data.held_out: missing, but required by evaluation.at_start, evaluation.at_end: set it, or "
        "evaluation.at_start=false evaluation.at_end=false",
    ),
    (
        GrpoConfig,
        ["data.held_out=null", "checkpoint.keep_best_metric=accuracy"],
        "checkpoint.keep_best_metric: accuracy is computed on data.held_out, which is not set: set it, or "
        "this one to null",
    ),
    (
        SftConfig,
        ["model.dtype=fp16"],
        "model.dtype: float16 is not supported: gradients underflow without loss scaling; use bfloat16 or "
        "float32 (got 'fp16')",
    ),
    (
        GrpoConfig,
        ["rollout.engine.dtype=fp64"],
        "rollout.engine.dtype: expected 'auto' or 'float32' or 'bfloat16' (got 'fp64')",
    ),
    (
        GrpoConfig,
        ["evaluation.num_prompts=101"],
        "evaluation.num_prompts: more than the held-out set has, data.held_out.size = 100 (got 101)",
    ),
    (
        EvalConfig,
        ["evaluation.num_prompts=101"],
        "evaluation.num_prompts: more than the held-out set has, data.held_out.size = 100 (got 101)",
    ),
]


@pytest.mark.parametrize(("kind", "overrides", "line"), BROKEN)
def test_broken(tmp_path: Path, kind: type[Section], overrides: list[str], line: str) -> None:
    assert lines(tmp_path, kind, overrides) == [line]


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        (
            SftConfig,
            [
                "parallel.sequence_parallel=true",
                "parallel.tensor_parallel_size=2",
                "parallel.num_processes=4",
            ],
        ),
        (SftConfig, ["optimizer.min_lr=0.001", "optimizer.lr_warmup_steps=11"]),
        (SftConfig, ["packing.max_sequence_length=4096", "training.batch_size=100"]),
        (SftConfig, ["data.held_out=null", "data.train.size=10"]),
        (GrpoConfig, ["rollout.engine.dtype=bfloat16"]),
        (GrpoConfig, ["rollout.num_generations_per_prompt=2", "algorithm.clip_low=0.99"]),
        (
            GrpoConfig,
            ["algorithm.clip_low=1", "algorithm.objective=cispo", "algorithm.old_logprobs=rollout"],
        ),
        (
            GrpoConfig,
            [
                "algorithm.dual_clip=1.01",
                "algorithm.ratio_level=sequence",
                "algorithm.num_epochs_per_batch=2",
            ],
        ),
        (GrpoConfig, ["algorithm.off_policy_correction=sequence_tis", "algorithm.off_policy_high=1"]),
        (
            GrpoConfig,
            [
                "algorithm.off_policy_correction=icepop",
                "algorithm.off_policy_low=0.99",
                "algorithm.off_policy_high=1.01",
            ],
        ),
        (
            GrpoConfig,
            ["algorithm.kl_coef=0.1", "algorithm.kl_estimator=k1", "algorithm.kl_gradient=score"],
        ),
        (GrpoConfig, ["rollout.top_k=20", "rollout.top_p=0.9", "algorithm.entropy_coef=0.01"]),
        (GrpoConfig, ["rollout.top_k=0", "rollout.top_p=1", "algorithm.num_epochs_per_batch=2"]),
        (GrpoConfig, ["rollout.max_new_tokens=511", "packing.max_sequence_length=512"]),
        (GrpoConfig, ["data.held_out.seed=0", "data.held_out.task=leg_counting"]),
        (GrpoConfig, ["data.held_out=null", "evaluation.at_start=false", "evaluation.at_end=false"]),
        (GrpoConfig, ["data.held_out=null"]),
        (GrpoConfig, ["model.dtype=bf16", "rollout.engine.dtype=fp32"]),
        (EvalConfig, ["data.format.system_prompt=Be brief."]),
    ],
)
def test_just_inside(tmp_path: Path, kind: type[Section], overrides: list[str]) -> None:
    assert lines(tmp_path, kind, overrides) == []


def test_line_number_of_the_field_that_was_written(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(SFT) + "parallel:\n  tensor_parallel_size: 2\n")
    number = len(file.read_text().splitlines())
    with pytest.raises(UserError) as caught:
        load_config(SftConfig, file, check_files=False)
    # num_processes has its default; the size that does not divide it is what stands in the file.
    assert str(caught.value).endswith(f"= 2 (got 1) [{file}:{number}]")


@pytest.mark.parametrize(("written", "read"), [("bf16", "bfloat16"), ("torch.float32", "float32")])
def test_short_names_of_dtypes(tmp_path: Path, written: str, read: str) -> None:
    """Wherever a setting is a dtype; the run's own configuration has the full name."""
    model = {"kind": "reward_model", "path": "rm", "dtype": written}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GRPO))
    rows = json.dumps({"source": "jsonl", "path": "rows.jsonl", "environment": model})
    settings = [f"model.dtype={written}", f"rollout.engine.dtype={written}", f"data.train={rows}"]
    config = load_config(GrpoConfig, file, settings, check_files=False)
    found = config.model.dtype, config.rollout.engine.dtype, config.data.train.environment.dtype
    assert found == (read, read, read)
    again = yaml.safe_load(dump_config(config))
    assert again["model"]["dtype"] == read


def test_short_names_beside_errors(tmp_path: Path) -> None:
    """The rest of a configuration with an error is checked with full names."""
    found = lines(
        tmp_path, GrpoConfig, ["model.dtype=bf16", "optimizer.lr=none", "evaluation.num_prompts=101"]
    )
    assert [line.split(":")[0] for line in found] == ["optimizer.lr", "evaluation.num_prompts"]


def test_which_evaluations_follow_the_held_out_data(tmp_path: Path) -> None:
    """Of a run of 10 steps."""
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GRPO))

    def evaluated(*settings: str) -> list[int]:
        config = load_config(GrpoConfig, file, settings, check_files=False)
        found = [step for step in range(11) if config.evaluates_after(step)]
        assert config.evaluates == bool(found)
        assert load_config(GrpoConfig, written(config), check_files=False) == config
        return found

    def written(config: GrpoConfig) -> Path:
        path = tmp_path / "resolved.yaml"
        path.write_text(dump_config(config))
        return path

    assert evaluated() == [0, 10]
    assert evaluated("evaluation.interval=4") == [0, 4, 8, 10]
    assert evaluated("evaluation.interval=4", "evaluation.at_start=false", "evaluation.at_end=false") == [
        4,
        8,
    ]
    assert evaluated("data.held_out=null") == []
    assert evaluated("data.held_out=null", "evaluation.at_end=false") == []


def test_a_warm_up_that_the_run_does_not_end_is_noted(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GRPO))
    two_by_two = ["algorithm.num_optimizer_steps_per_batch=2", "algorithm.num_epochs_per_batch=2"]

    def notes(kind: Any, *settings: str) -> list[str]:
        found: list[str] = load_config(kind, file, settings, check_files=False).notes()
        return found

    assert notes(GrpoConfig, *two_by_two, "optimizer.lr_warmup_steps=40") == []
    assert notes(GrpoConfig, *two_by_two, "optimizer.lr_warmup_steps=41") == [
        "the peak learning rate is never reached: optimizer.lr_warmup_steps = 41 exceeds the run's 40 "
        "optimizer steps"
    ]
    # The critic trains in all 10 steps, the policy in 4 of them.
    own = ["critic.warmup_steps=6", "critic.optimizer={lr: 1e-3, lr_warmup_steps: 11}"]
    assert [line.partition(": ")[2] for line in notes(PpoConfig, *own, "optimizer.lr_warmup_steps=5")] == [
        "optimizer.lr_warmup_steps = 5 exceeds the run's 4 optimizer steps",
        "critic.optimizer.lr_warmup_steps = 11 exceeds the run's 10 optimizer steps",
    ]
