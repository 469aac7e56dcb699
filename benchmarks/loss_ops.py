"""Rows of ``python -m benchmarks ops`` beyond the logprobs: vocab_kl, policy_loss and the small ops."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.common import Implementation, Row, measure
from megarl.ops import PolicyLossOptions, policy_loss, vocab_kl
from megarl.ops.gae import gae
from megarl.ops.group_advantage import group_advantage
from megarl.ops.segment_reduce import segment_reduce
from tests.oracles import ops as reference

KL_CASES = [(512, 49_152), (128, 151_936)]
NUM_TOKENS = 65_536
NUM_SEQUENCES = 256
NUM_SAMPLES, GROUP_SIZE = 4096, 16
# The options of GRPO with a reference model and token-level importance sampling.
OPTIONS = PolicyLossOptions(
    clip_high=0.28,
    dual_clip=3.0,
    correction="tis",
    correction_high=2.0,
    kl="k3",
    kl_coef=0.01,
    entropy_coef=0.001,
)
TOKENS_CASE, SAMPLES_CASE = f"{NUM_TOKENS} tokens fp32", f"{NUM_SAMPLES} samples fp32"


def kl_case_name(rows: int, columns: int) -> str:
    """Return the case's name in the JSON file."""
    return f"2 x [{rows}, {columns}] fp32"


def eager_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) per row, computed in plain torch."""
    log_p, log_q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def vocab_kl_rows(rows: int, columns: int, repeats: int) -> list[Row]:
    """Measure forward KL with gradient to the student; ours overwrites its logits, so calls get copies."""
    torch.manual_seed(0)
    student, teacher = torch.randn(rows, columns) * 2, torch.randn(rows, columns) * 2

    def copied() -> tuple[torch.Tensor, torch.Tensor]:
        return student.clone(), teacher

    def leaf() -> tuple[torch.Tensor, torch.Tensor]:
        return student.clone().requires_grad_(), teacher

    def with_gradient(
        function: Callable[..., torch.Tensor],
    ) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]:
        def both(own: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(function(own, other), [own], torch.linspace(-1, 1, rows))

        return both

    compiled = torch.compile(eager_kl, dynamic=False)
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "megarl": vocab_kl,
        "torch_eager": eager_kl,
        "torch_compile": compiled,
    }
    forward = [Implementation(name, torch.no_grad()(f), copied) for name, f in functions.items()]
    both = [Implementation(name, with_gradient(f), leaf) for name, f in functions.items()]
    case = kl_case_name(rows, columns)
    return [
        *measure("vocab_kl", case, "fwd", forward, repeats),
        *measure("vocab_kl", case, "fwdbwd", both, repeats),
    ]


def policy_loss_rows(repeats: int) -> list[Row]:
    """Measure loss and gradients of a microbatch. Ours also returns the 17 logged sums, the peers do not."""
    torch.manual_seed(0)
    old = -torch.rand(NUM_TOKENS)
    fixed = (old, torch.randn(NUM_TOKENS), (torch.rand(NUM_TOKENS) < 0.7).float() / NUM_TOKENS)
    moved = [old + 0.1 * torch.randn(NUM_TOKENS) for _ in range(3)]
    logprobs, entropy = moved[0].requires_grad_(), torch.rand(NUM_TOKENS).requires_grad_()
    others = {"entropy": entropy, "ref_logprobs": moved[1], "rollout_logprobs": moved[2]}

    def eager() -> torch.Tensor:
        return reference.policy_loss(logprobs, *fixed, OPTIONS, **others)

    compiled = torch.compile(reference.policy_loss, dynamic=False)
    functions: dict[str, Callable[[], torch.Tensor]] = {
        "megarl": lambda: policy_loss(logprobs, *fixed, options=OPTIONS, **others).loss,
        "torch_eager": eager,
        "torch_compile": lambda: compiled(logprobs, *fixed, OPTIONS, **others),
    }

    def with_gradient(function: Callable[[], torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
        return lambda: torch.autograd.grad(function(), [logprobs, entropy])

    both = [Implementation(name, with_gradient(f)) for name, f in functions.items()]
    return measure("policy_loss", TOKENS_CASE, "fwdbwd", both, repeats)


def eager_group_advantage(rewards: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Normalise as GRPO does, a group at a time, as a ragged batch needs it."""
    groups = rewards.split(sizes)
    return torch.cat([(group - group.mean()) / (group.std() + 1e-6) for group in groups])


def eager_segment_sums(values: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """Return sums per sequence, given the sequence of every token."""
    return values.new_zeros(NUM_SEQUENCES).index_add(0, segment, values)


def eager_gae(
    rewards: torch.Tensor, values: torch.Tensor, lengths: list[int], gamma: float, gae_lambda: float
) -> torch.Tensor:
    """Compute GAE over sequences padded to one length: a loop over positions, common in trainers."""
    padded_rewards, padded_values = (
        torch.nn.utils.rnn.pad_sequence(list(tensor.split(lengths)), batch_first=True)
        for tensor in (rewards, values)
    )
    advantage = following = torch.zeros(len(lengths))
    steps: list[torch.Tensor] = []
    for t in reversed(range(padded_rewards.shape[1])):
        delta = padded_rewards[:, t] + gamma * following - padded_values[:, t]
        advantage = delta + gamma * gae_lambda * advantage
        following = padded_values[:, t]
        steps.append(advantage)
    padded = torch.stack(steps[::-1], 1)
    return torch.cat([row[:n] for row, n in zip(padded, lengths, strict=True)])


def small_rows(repeats: int) -> list[Row]:
    """Measure group_advantage, segment_reduce and gae against torch."""
    torch.manual_seed(0)
    rewards = torch.rand(NUM_SAMPLES)
    groups = torch.arange(0, NUM_SAMPLES + 1, GROUP_SIZE, dtype=torch.int32)
    rows = measure(
        "group_advantage",
        SAMPLES_CASE,
        "fwd",
        [
            Implementation("megarl", lambda: group_advantage(rewards, groups)),
            Implementation(
                "torch_eager",
                lambda: eager_group_advantage(rewards, [GROUP_SIZE] * (NUM_SAMPLES // GROUP_SIZE)),
            ),
        ],
        repeats,
    )
    cuts = torch.randperm(NUM_TOKENS - 1)[: NUM_SEQUENCES - 1].sort().values + 1
    bounds = torch.cat([torch.tensor([0]), cuts, torch.tensor([NUM_TOKENS])]).int()
    lengths: list[int] = bounds.diff().tolist()
    segment = torch.repeat_interleave(torch.arange(NUM_SEQUENCES), bounds.diff())
    values, mask = torch.randn(NUM_TOKENS), torch.ones(NUM_TOKENS)
    rows += measure(
        "segment_reduce",
        TOKENS_CASE,
        "fwd",
        [
            Implementation("megarl", lambda: segment_reduce(values, bounds)),
            Implementation("torch_eager", lambda: eager_segment_sums(values, segment)),
        ],
        repeats,
    )
    token_rewards = torch.randn(NUM_TOKENS)
    rows += measure(
        "gae",
        TOKENS_CASE,
        "fwd",
        [
            Implementation(
                "megarl", lambda: gae(token_rewards, values, mask, bounds, gamma=0.99, gae_lambda=0.95)
            ),
            Implementation("torch_eager", lambda: eager_gae(token_rewards, values, lengths, 0.99, 0.95)),
        ],
        repeats,
    )
    return rows
