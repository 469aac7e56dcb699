"""The jobs of `megarl`, one record each.

The command line, suggestions, the console, the report, `megarl data inspect` and docs/configuration.md read
:data:`JOBS`. Configuration roots and loops are import paths, imported on demand: the command line lists all
jobs and loads the configuration of one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the step line: the first metric of ``sources`` (name -> title) that the step logged.

    ``general`` is the title before any step has logged one of several sources; None: that of the first.
    """

    sources: Mapping[str, str]
    form: Literal["count", "fixed", "percent", "scientific", "thousands", "seconds"]
    width: int
    general: str | None = None

    @property
    def title(self) -> str:
        """The title where no source is known."""
        return self.general or next(iter(self.sources.values()))


@dataclass(frozen=True, slots=True)
class Data:
    """The dataset of a job.

    ``noun`` is the plural of its examples. ``load`` is the import path of a function (config, tokenizer,
    longest sequence in tokens, split) -> dataset (:mod:`megarl.loops.datasets`).
    """

    noun: str
    load: str

    def loader(self) -> Any:
        """Import and return the function."""
        return import_path(self.load)


@dataclass(frozen=True, slots=True)
class Job:
    """The job that `megarl NAME --config FILE` runs.

    ``config`` is the import path of the configuration root, ``run`` that of the loop, a function of that
    root. ``help`` is a phrase for the command line, ``example`` the rest of an example command after
    --config. A job with ``trains=False`` starts no trainer ranks and accepts models that are not trainable.
    """

    name: str
    help: str
    config: str
    run: str
    data: Data
    columns: tuple[Column, ...]
    example: str
    trains: bool = True

    def root(self) -> Any:
        """Import and return the class of its configuration."""
        return import_path(self.config)

    def loop(self) -> Any:
        """Import and return the function that runs it."""
        return import_path(self.run)


def import_path(path: str) -> Any:
    """Import and return the object "package.module:name"."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


SEQUENCES = Data("sequences", "megarl.loops.datasets:load_sequences")
PAIRS = Data("pairs", "megarl.loops.datasets:load_preference_pairs")
PROBLEMS = Data("problems", "megarl.loops.datasets:load_problems")

_STEP = Column({"step": "step"}, "count", 6)
_LOSS = Column({"loss": "loss"}, "fixed", 8)
_REWARD = Column({"reward_mean": "reward"}, "fixed", 7)
_ACCURACY = Column({"accuracy": "held-out acc"}, "percent", 12)
_MISMATCH = Column({"logprob_abs_diff_max": "logp diff"}, "scientific", 9)
_LENGTH = Column({"response_length_mean": "length"}, "fixed", 7)
_VALIDATION = Column({"validation_loss": "validation"}, "fixed", 10)
_OPTIMIZER = (Column({"grad_norm": "grad norm"}, "fixed", 9), Column({"lr": "lr"}, "scientific", 7))
_SPEED = (
    Column({"tokens_per_second": "tok/s"}, "thousands", 9),
    Column({"seconds": "seconds"}, "seconds", 7),
)
_ONLINE_TAIL = (_MISMATCH, *_OPTIMIZER, _LENGTH, *_SPEED)
_PAIRS_TAIL = (
    Column({"reward_accuracy": "train acc"}, "percent", 9),
    Column({"reward_margin": "margin"}, "fixed", 8),
    _VALIDATION,
    Column({"validation_accuracy": "held-out acc"}, "percent", 12),
    *_OPTIMIZER,
    *_SPEED,
)

_ALL = (
    Job(
        "sft",
        "supervised fine-tuning on demonstrations",
        config="megarl.config.sft:SftConfig",
        run="megarl.algorithms.sft:run_sft",
        data=SEQUENCES,
        columns=(_STEP, _LOSS, _VALIDATION, *_OPTIMIZER, *_SPEED),
        example="configs/quickstart_sft.yaml",
    ),
    Job(
        "dpo",
        "training on preference pairs (DPO, IPO, KTO, SimPO, ORPO)",
        config="megarl.config.preference:DpoConfig",
        run="megarl.algorithms.preference:run_dpo",
        data=PAIRS,
        columns=(_STEP, _LOSS, *_PAIRS_TAIL),
        example="configs/quickstart_dpo.yaml algorithm.loss=simpo",
    ),
    Job(
        "rm",
        "reward-model training on preference pairs (Bradley-Terry)",
        config="megarl.config.preference:RmConfig",
        run="megarl.algorithms.preference:run_rm",
        data=PAIRS,
        columns=(_STEP, _LOSS, *_PAIRS_TAIL),
        example="configs/quickstart_rm.yaml",
    ),
    Job(
        "grpo",
        "reinforcement learning with verifiable rewards (GRPO)",
        config="megarl.config.grpo:GrpoConfig",
        run="megarl.algorithms.grpo:run_grpo",
        data=PROBLEMS,
        columns=(
            _STEP,
            _REWARD,
            _ACCURACY,
            Column({"kl_ref": "kl ref", "kl_policy": "kl old"}, "scientific", 8, general="kl"),
            *_ONLINE_TAIL,
        ),
        example="configs/quickstart_grpo.yaml optimizer.lr=2e-4 training.num_steps=20",
    ),
    Job(
        "ppo",
        "reinforcement learning with a critic (PPO)",
        config="megarl.config.ppo:PpoConfig",
        run="megarl.algorithms.ppo:run_ppo",
        data=PROBLEMS,
        columns=(
            _STEP,
            _REWARD,
            _ACCURACY,
            Column({"explained_variance": "expl. var"}, "fixed", 9),
            Column({"value_loss": "value loss"}, "scientific", 10),
            *_ONLINE_TAIL,
        ),
        example="configs/quickstart_ppo.yaml critic.warmup_steps=5",
    ),
    Job(
        "distill",
        "on-policy distillation from a larger teacher",
        config="megarl.config.distill:DistillConfig",
        run="megarl.algorithms.distill:run_distill",
        data=PROBLEMS,
        columns=(
            _STEP,
            Column({"loss": "divergence"}, "scientific", 10),
            _REWARD,
            _ACCURACY,
            *_ONLINE_TAIL,
        ),
        example="configs/quickstart_distill.yaml --dry-run",
    ),
    Job(
        "eval",
        "accuracy, pass@k and cons@k of a checkpoint on held-out problems or a benchmark",
        config="megarl.config.evaluate:EvalConfig",
        run="megarl.loops.evaluation:run_eval",
        data=PROBLEMS,
        columns=(_STEP, _ACCURACY),
        example="configs/quickstart_eval.yaml model.path=runs/quickstart/sft/hf",
        trains=False,
    ),
)

JOBS: dict[str, Job] = {job.name: job for job in _ALL}
"""Name -> job, in the order of listing."""

_OTHER_ROOTS = {"plan": "megarl.config.plan:PlanConfig"}


def roots() -> dict[str, Any]:
    """Return command -> configuration root, of all jobs and of `megarl plan`."""
    return {job.name: job.root() for job in JOBS.values()} | {
        name: import_path(path) for name, path in _OTHER_ROOTS.items()
    }


def job_with_sections(names: Collection[str]) -> Job:
    """Return the job whose configuration matches these sections best: fewest unknown, then fewest missing."""

    def mismatch(job: Job) -> tuple[int, int]:
        fields = job.root().model_fields.keys()
        return len(set(names) - fields), len(fields - set(names))

    return min(JOBS.values(), key=mismatch)
