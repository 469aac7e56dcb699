"""The policy-gradient loss of a packed microbatch, its gradient and every logged sum.

Per token, with r = exp(logprob - old_logprob) (level "sequence": of the sequence's mean of that
difference, GSPO, arXiv:2507.18071) and A the advantage:

    clip    max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high))         PPO, arXiv:1707.06347
            and, for A < 0, min(that, -A dual_clip)                     arXiv:1912.09729
    cispo   -A sg(clamp(r, 1 - clip_low, 1 + clip_high)) logprob        arXiv:2506.13585
    sapo    -A 4 / t sigmoid(t (r - 1)), t = positive[0] where A > 0,
            else negative[0]                                            SAPO, arXiv:2511.20347
    dppo    -A r; 0 where A > 0 and p - p_old > clip_high,
            or A < 0 and p - p_old < -clip_low, with p = exp(logprob)   DPPO, arXiv:2602.04879
    vespo   -A sg(e^l w^k e^(-l w)) logprob, with w the product of the
            sequence's r within [1e-8, e^20], (k, l) = negative
            where A < 0, else positive                                  VESPO, arXiv:2602.10693

times the off-policy weight, a constant to the gradient, with w = exp(old_logprob - rollout_logprob) and
g = exp of the sequence's mean of that difference (sequence_weight "product": of its sum), and a mask m that
is 1 where g is inside [correction_low, correction_high], else 0:

    tis                clamp(w, correction_low, correction_high)
    icepop             w inside [correction_low, correction_high], else 0
    sequence_mask      m
    sequence_tis       clamp(g, correction_low, correction_high)
    sequence_mask_tis  m min(w, correction_token_high)
    sequence_icepop    m g

plus kl_coef times a KL estimate to the reference (Schulman 2020), with d = ref_logprob - logprob within
+-kl_input_clamp:

    k1 = -d        k2 = d^2 / 2        k3 = exp(d) - 1 - d

minus entropy_coef times the entropy. The gradient of the estimate, by kl_gradient:

    plain             its derivative k' (k3: 1 - exp(d))
    score             logprob - ref_logprob, in expectation that of the reverse KL
    unbiased          k + k': of the estimate's expectation under the policy (arXiv:2506.09477)
    unbiased_old      v (k + k'), and the value v k, with v = exp(logprob - old_logprob)
    unbiased_rollout  the same with v = exp(logprob - rollout_logprob)

The value is within +-kl_output_clamp. All logs of ratios (also those of v, w and g) are within
+-log_ratio_clamp. What a clamp changes has no gradient, but for kl_gradient "score".

The loss is sum_t weights[t] * loss[t]. weights hold mask and denominators: mask / T for token level,
mask / (tokens of the sequence * S) for sequence level, with global T and S. With level "sequence" each
token receives its own share of the gradient, as if the mean's gradient passed straight through to it
(GSPO-token); where weights and advantages are constant over a sequence this is GSPO's gradient exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from megarl.ops._load import load_native
from megarl.ops._shards import check_finite

load_native()

# In the order of csrc/policy_loss/policy_loss_math.h.
SUM_NAMES = (
    "loss",  # the differentiated value
    "policy_loss",  # its terms, weighted by `weights` but not by their coefficients
    "kl_loss",
    "entropy_loss",
    "tokens",  # from here on, plain sums over tokens with nonzero weight
    "ratio",
    "clipped_low",
    "clipped_high",
    "dual_clipped",
    "old_kl",  # k3 estimate of KL(old || current)
    "ref_kl",
    "entropy",
    "correction_weight",
    "corrected",  # tokens whose off-policy weight was truncated or set to 0
    "rollout_exp_error",  # exp|old - rollout|
    "rollout_kl",  # k3 estimate of KL(rollout || old)
    "rollout_max_error",  # max|old - rollout|: combine by maximum, not by sum
)


@dataclass(frozen=True, slots=True)
class PolicyLossOptions:
    """Kind of loss and its parameters; formulas are in the module's docstring. An infinite bound is none."""

    objective: Literal["clip", "cispo", "sapo", "dppo", "vespo"] = "clip"
    level: Literal["token", "sequence"] = "token"  # of clip, cispo and sapo
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    correction: Literal[
        "none",
        "tis",
        "icepop",
        "sequence_mask",
        "sequence_tis",
        "sequence_mask_tis",
        "sequence_icepop",
    ] = "none"
    correction_low: float = 0.0
    correction_high: float = math.inf
    correction_token_high: float = math.inf
    sequence_weight: Literal["geometric_mean", "product"] = "geometric_mean"
    log_ratio_clamp: float = math.inf
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    kl_gradient: Literal["plain", "score", "unbiased", "unbiased_old", "unbiased_rollout"] = "plain"
    kl_coef: float = 0.0
    kl_input_clamp: float = math.inf
    kl_output_clamp: float = math.inf
    entropy_coef: float = 0.0
    positive: tuple[float, float] = (1.0, 0.0)
    negative: tuple[float, float] = (1.0, 0.0)

    @property
    def by_sequence(self) -> bool:
        """True if sums over sequences are needed."""
        return self.level == "sequence" or self.objective == "vespo" or self.correction.startswith("sequence")

    @property
    def reads_rollout(self) -> bool:
        """True if rollout_logprobs enter the loss."""
        return self.correction != "none" or (self.kl != "none" and self.kl_gradient == "unbiased_rollout")

    @property
    def numbers(self) -> list[float]:
        """The numeric arguments of the op, in the order of make_policy_options (policy_loss_math.h)."""
        return [
            self.clip_low,
            self.clip_high,
            math.inf if self.dual_clip is None else self.dual_clip,
            self.correction_low,
            self.correction_high,
            self.correction_token_high,
            self.log_ratio_clamp,
            self.kl_coef,
            self.kl_input_clamp,
            self.kl_output_clamp,
            self.entropy_coef,
            *self.positive,
            *self.negative,
        ]


class PolicyLoss(NamedTuple):
    """The loss [] in the dtype of logprobs, and the float64 sums [17] in the order of SUM_NAMES.

    sequence_sums [S, 3] float64, with options.by_sequence: per sequence the sums over its tokens of
    logprob - old_logprob and of old_logprob - rollout_logprob, and their number (0: no token here).
    """

    loss: torch.Tensor
    sums: torch.Tensor
    sequence_sums: torch.Tensor | None


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    options: PolicyLossOptions,
    entropy: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    rollout_logprobs: torch.Tensor | None = None,
    sequence_ids: torch.Tensor | None = None,
    num_sequences: int | None = None,
    cp_group: dist.ProcessGroup | None = None,
    check_numerics: bool = False,
) -> PolicyLoss:
    """Return the loss over R tokens and its logged sums; sums are bitwise repeatable.

    All per-token tensors are [R]; tokens of weight 0 are ignored, whatever their values. Gradients flow to
    logprobs (fp32 or fp64) and entropy. If options.by_sequence, sequence_ids [R] int64 are needed, ascending,
    below num_sequences; cp_group sums the sequence means over the ranks that share sequences.

    Raises:
        ValueError: names the argument and its value.
        FloatingPointError: with check_numerics, names the row.
    """
    if check_numerics:
        _check_inputs(logprobs, old_logprobs, advantages, weights, entropy, ref_logprobs, rollout_logprobs)
    dtype = logprobs.dtype
    old, advantages, weights = (tensor.detach().to(dtype) for tensor in (old_logprobs, advantages, weights))
    ref = None if ref_logprobs is None else ref_logprobs.detach().to(dtype)
    rollout = None if rollout_logprobs is None else rollout_logprobs.detach().to(dtype)
    sequence_sums = None
    if options.by_sequence:
        if sequence_ids is None or num_sequences is None:
            raise ValueError(
                "megarl::policy_loss: sequence_ids and num_sequences are needed by what goes by sequence"
            )
        sequence_sums = torch.ops.megarl.policy_sequence_sums(
            logprobs.detach(), old, rollout, weights, sequence_ids, num_sequences
        )
        if cp_group is not None:
            dist.all_reduce(sequence_sums, group=cp_group)
    sums = torch.ops.megarl.policy_loss(
        logprobs,
        entropy,
        old,
        advantages,
        weights,
        ref,
        rollout,
        sequence_ids,
        sequence_sums,
        options.objective,
        options.level,
        options.correction,
        options.sequence_weight,
        options.kl,
        options.kl_gradient,
        options.numbers,
    )
    return PolicyLoss(sums[0].to(dtype), sums.detach(), sequence_sums)


class _Inputs(NamedTuple):
    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor
    ref_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor


def _check_inputs(logprobs: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Run check_finite over the tokens with nonzero weight."""
    counted = others[2] != 0 if others[2] is not None else torch.ones_like(logprobs, dtype=torch.bool)
    fields = (torch.zeros_like(logprobs) if field is None else field for field in (logprobs, *others))
    check_finite("policy_loss", _Inputs(*(field.detach().masked_fill(~counted, 0.0) for field in fields)))


@torch.library.register_fake("megarl::policy_sequence_sums")
def _fake_sequence_sums(logprobs: torch.Tensor, *rest: Any) -> torch.Tensor:
    return logprobs.new_empty(rest[-1], 3, dtype=torch.float64)


@torch.library.register_fake("megarl::policy_loss")
def _fake_loss(logprobs: torch.Tensor, *_: Any) -> torch.Tensor:
    return logprobs.new_empty(len(SUM_NAMES), dtype=torch.float64)


@torch.library.register_fake("megarl::policy_loss_backward")
def _fake_backward(
    grad_loss: torch.Tensor, logprobs: torch.Tensor, entropy: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(logprobs), logprobs.new_empty(0 if entropy is None else logprobs.shape[0])


_NUM_TENSORS = 9


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS])
    ctx.options = inputs[_NUM_TENSORS:]


def _backward(ctx: Any, grad_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    tensors = ctx.saved_tensors
    by_logprob, by_entropy = torch.ops.megarl.policy_loss_backward(grad_sums[0], *tensors, *ctx.options)
    rest = (None,) * (_NUM_TENSORS - 2 + len(ctx.options))
    return by_logprob, None if tensors[1] is None else by_entropy, *rest


torch.library.register_autograd("megarl::policy_loss", _backward, setup_context=_save)
