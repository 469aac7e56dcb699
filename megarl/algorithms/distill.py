"""On-policy distillation (GKD: Agarwal et al. 2023, arXiv:2306.13649, with student samples only).

After the rollout, a step runs::

    samples (rank 0) -> each rank's microbatches -> teacher's hidden states
        -> divergence of both distributions -> optimizer

With p the student's and q the teacher's distribution of a response token, both at rollout.temperature, the
loss is the mean over tokens of KL(q || p) (forward), KL(p || q) (reverse), or with M = (1 - beta) p + beta q
(1 - beta) KL(p || M) + beta KL(q || M) (jensen_shannon). It is exact over the vocabulary without
materialising either model's full logits; forward may be restricted to the teacher's top k. Tokens are drawn
from p; as in the paper, no gradient flows through the sampling. Rewards are only logged.
"""

from __future__ import annotations

import torch

from megarl.batching.token_trace import TokenTrace
from megarl.config.distill import DistillConfig
from megarl.data.tokenizer import load_tokenizer
from megarl.errors import UserError
from megarl.loops import minibatches
from megarl.loops.online import Learned, run_online
from megarl.losses.base import LossResult
from megarl.losses.distill import DistillOptions, distill_loss
from megarl.losses.hidden import HiddenTokens
from megarl.losses.logprob_mismatch import LogprobMismatch
from megarl.models import load_architecture
from megarl.records import Group, PackedBatch
from megarl.runs.training_run import TrainingRun
from megarl.trainer.build import build_frozen
from megarl.trainer.interface import Trainer
from megarl.trainer.outputs import Output, Sampler
from megarl.trainer.passes import TrainStepResult
from megarl.trainer.reduce import mismatch_of, reduce_mismatch


def run_distill(config: DistillConfig) -> None:
    """Train until ``training.num_steps``, resuming from the run directory's latest checkpoint."""
    check_vocabularies(config)
    run_online(config, "distill", DistillLearner)


def check_vocabularies(config: DistillConfig) -> None:
    """Raise UserError unless teacher and student share their token ids."""
    paths, any_family = (config.model.path, config.teacher.path), config.trainer.any_family
    student, teacher = (load_architecture(path, any_family=any_family).spec for path in paths)
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"teacher.path: {config.teacher.path} has a vocabulary of {teacher.vocab_size} tokens, the "
            f"student one of {student.vocab_size}"
        )
    ours, theirs = (load_tokenizer(path).get_vocab() for path in (config.model.path, config.teacher.path))
    if ours != theirs:
        token = next(iter(sorted(set(ours.items()) ^ set(theirs.items()))))[0]
        raise UserError(
            f"teacher.path: {config.teacher.path} has another tokenizer than {config.model.path} (token "
            f"{token!r})"
        )


class DistillLearner:
    """Implements :class:`megarl.loops.online.Learner`."""

    def __init__(self, config: DistillConfig, run: TrainingRun, policy: Trainer) -> None:
        self.config, self.run, self.policy, self.trained = config, run, policy, policy
        algorithm, path = config.algorithm, config.teacher.path
        model = config.model.model_copy(update={"path": path})
        architecture = load_architecture(path, any_family=config.trainer.any_family)
        teacher = build_frozen(policy.context, architecture, model, config.packing)
        self.distiller = Distiller(
            policy,
            teacher,
            DistillOptions(
                divergence=algorithm.divergence,
                beta=0.5 if algorithm.beta is None else algorithm.beta,
                temperature=config.rollout.temperature,
                top_k=algorithm.teacher_top_k,
                renormalize=algorithm.renormalize_top_k is not False,
            ),
            Sampler(config.rollout.temperature, config.rollout.top_k, config.rollout.top_p),
        )

    def notes(self) -> list[str]:
        """See Learner."""
        algorithm = self.config.algorithm
        over = (
            "the whole vocabulary"
            if algorithm.teacher_top_k is None
            else f"the teacher's top {algorithm.teacher_top_k}"
        )
        return [f"teacher: {self.config.teacher.path}; {algorithm.divergence} divergence over {over}"]

    def learn(self, step: int, groups: list[Group]) -> Learned:
        """See Learner. Samples have no advantages."""
        algorithm = self.config.algorithm
        minis, _ = minibatches.make(groups, algorithm.num_optimizer_steps_per_batch)
        values = minibatches.pack(self.policy, minis, algorithm.loss_aggregation)
        with self.run.timers("logprobs"):
            for mini in minis:
                self.distiller.read_teacher(mini.batches)
        minibatches.trace_first(minis, self.config.logging.samples_per_step)
        results = [
            self.distiller.step(mini.batches, mini.trace)
            for mini in minibatches.epochs(self.run, minis, algorithm.num_epochs_per_batch)
        ]
        self.distiller.forget()
        values |= minibatches.mean_metrics(
            [result.metrics for result in results]
        ) | minibatches.split_metrics(minis)
        values |= minibatches.train_speed(self.run, values, algorithm)
        # The first step's logprobs are computed with the weights that drew the samples.
        return Learned(values, results[0].mismatch, minibatches.traced(self.policy, minis))


class Distiller:
    """Train ``student`` towards ``teacher``, under the same layout. Every rank calls every method.

    ``drawn_by`` is what the engine drew the samples with: its logprobs are compared with the student's of the
    same distribution, though the divergence is over the whole vocabulary. None: at the options' temperature.
    """

    def __init__(
        self, student: Trainer, teacher: Trainer, options: DistillOptions, drawn_by: Sampler | None = None
    ) -> None:
        self.student, self.teacher, self.options = student, teacher, options
        self.drawn_by = drawn_by or Sampler(options.temperature)
        self._teacher_at: dict[int, HiddenTokens] = {}  # by the microbatch's id, until forget()

    def read_teacher(self, batches: list[PackedBatch]) -> None:
        """Run the teacher forward; keep its hidden states [N, H] at the targets until :meth:`forget`."""

        def keep(output: Output) -> None:
            self._teacher_at[id(output.batch)] = output.at_targets(lasting=True)

        self.teacher.run(batches, keep)

    def forget(self) -> None:
        """Release the teacher's hidden states."""
        self._teacher_at.clear()

    def step(self, batches: list[PackedBatch], trace: TokenTrace | None = None) -> TrainStepResult:
        """Take one optimizer step of the student on the divergence from :meth:`read_teacher`'s states.

        ``trace`` keeps what the student computes for its sequences.
        """
        mismatch, sampler = LogprobMismatch(), Sampler(self.options.temperature)

        def learn(output: Output) -> LossResult:
            nonlocal mismatch
            with torch.no_grad():
                tokens = output.logprobs(sampler)
                drawn = output.logprobs(self.drawn_by) if self.drawn_by.truncates else tokens
            mismatch = mismatch + mismatch_of(drawn)
            if trace is not None:
                trace.read(output.batch, drawn)
            teacher = self._teacher_at[id(output.batch)]
            return distill_loss(self.options, output.at_targets(), teacher, tokens)

        metrics = self.student.optimizer_step(batches, learn)
        if trace is not None:
            trace.close()
        return TrainStepResult(metrics, reduce_mismatch(self.student.context, mismatch))
